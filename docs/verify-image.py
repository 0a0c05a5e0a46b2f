#!/usr/bin/env python3
"""Check an image with nothing of imaged's.

usage: verify-image.py IMAGE-DIRECTORY RAW-FILE

Writes the disk to RAW-FILE, which is then ready for use, and compares both
digests with the manifest. Needs: apt-get install python3 qemu-utils b3sum
"""
import hashlib, json, os, subprocess, sys

image, raw = sys.argv[1:] if len(sys.argv) == 3 else sys.exit(__doc__)
told = json.load(open(image + "/manifest.json"))
with open(image + "/image.qcow2", "rb") as file:
    sums = [hashlib.sha256(file.read(part["size"])).digest() for part in told["parts"]]
    found = {"objectDigest": hashlib.sha256(b"".join(sums)).hexdigest(), "bytes after the last part": file.read(1)}
subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image + "/image.qcow2", raw], check=True)
os.truncate(raw, told["virtualSize"])
extents = "split --bytes=1M --filter='b3sum --raw --num-threads=1' -- \"$0\" | b3sum --no-names"
found["contentDigest"] = subprocess.check_output(["sh", "-c", extents, raw], text=True).strip()
wrong = [name for name, value in found.items() if value != told.get(name, b"")]
sys.exit(f"{image} IS NOT WHAT WAS STORED: {', '.join(wrong)} differ" if wrong else print(f"{image}: both digests match"))
