#!/usr/bin/env python3
"""Runs the lab's guest (see guest.sh) under QEMU, emulated: never KVM, which can exist and hang.

  vm.py start --disk PATH --format raw|qcow2 --dir RUNDIR [--snapshot] [-- QEMU-ARGUMENT ...]
  vm.py wait-agent --dir RUNDIR      until the guest agent answers
  vm.py hostname   --dir RUNDIR      what the agent says
  vm.py exec       --dir RUNDIR PROGRAM [ARGUMENT ...]   in the guest; prints what it printed
  vm.py qmp        --dir RUNDIR COMMAND    what QEMU answers, in JSON
  vm.py shutdown   --dir RUNDIR      through the agent, until QEMU is gone
  vm.py kill       --dir RUNDIR      SIGKILL; success when it does not run

RUNDIR gets agent.sock, qmp.sock, serial.log and qemu.pid. The disk is the block node "boot" on
the device "bootdisk". Everything has a deadline (--timeout seconds).
"""

import argparse
import base64
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LAB = Path(os.environ.get("IMAGED_LAB") or Path(__file__).resolve().parents[2] / "target/lab")
SERIAL_TAIL = 20  # lines of the guest's console in an error
SOCKET_PATH_MAX = 107  # sun_path is 108 bytes with its NUL


class LabError(Exception):
    """Something that the one who runs the lab can act on."""


class Vm:
    """One QEMU process, known by its run directory."""

    def __init__(self, directory):
        self.dir = Path(directory).absolute()
        self.agent_socket = self.dir / "agent.sock"
        self.qmp_socket = self.dir / "qmp.sock"
        self.serial_log = self.dir / "serial.log"
        self.pid_file = self.dir / "qemu.pid"

    def pidfd(self):
        """A handle on the process, or None when it does not run."""
        try:
            pid = int(self.pid_file.read_text())
            handle = os.pidfd_open(pid)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return None
        # The pid may be another process's by now: ours has this directory among its arguments.
        try:
            if os.fsencode(f"{self.agent_socket},") in Path(f"/proc/{pid}/cmdline").read_bytes():
                return handle
        except (FileNotFoundError, ProcessLookupError):
            pass
        os.close(handle)
        return None

    def gone(self):
        return (
            f"no VM runs in {self.dir} (vm.py start starts one); "
            f"the end of {self.serial_log}:\n{self.serial_tail()}"
        )

    def serial_tail(self):
        try:
            lines = self.serial_log.read_text(errors="replace").splitlines()[-SERIAL_TAIL:]
        except FileNotFoundError:
            return "  | (no such file)"
        return "\n".join(f"  | {line}" for line in lines) or "  | (nothing)"


def start(vm, disk, disk_format, snapshot, memory, qemu_args):
    guest = LAB / "guest"
    if not (guest / "vmlinuz").exists():
        raise LabError(f"there is no guest in {guest}: build it with tests/lab/guest.sh")
    disk = Path(disk).absolute()
    if not disk.exists():
        raise LabError(f"there is no disk {disk}")
    if disk.resolve().is_relative_to(guest.resolve()) and not snapshot:
        raise LabError(f"{disk} is the cache that all tests share: copy it, or use --snapshot")
    if len(os.fsencode(vm.agent_socket)) > SOCKET_PATH_MAX:
        raise LabError(f"{vm.dir} is too long for the path of a socket: use a shorter directory")
    if vm.pidfd() is not None:
        raise LabError(f"a VM runs in {vm.dir} already: stop it with vm.py kill --dir {vm.dir}")

    vm.dir.mkdir(parents=True, exist_ok=True)
    for leftover in (vm.agent_socket, vm.qmp_socket, vm.serial_log, vm.pid_file):
        leftover.unlink(missing_ok=True)
    if snapshot:
        # -snapshot does nothing for -blockdev.
        overlay = vm.dir / "overlay.qcow2"
        overlay.unlink(missing_ok=True)
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", disk_format, "-b", disk, overlay])
        disk, disk_format = overlay, "qcow2"

    block = {
        "driver": disk_format,
        "node-name": "boot",
        "discard": "unmap",
        "file": {
            "driver": "host_device" if disk.is_block_device() else "file",
            "node-name": "boot-file",
            "filename": str(disk),
            "locking": "on",
            "discard": "unmap",
        },
    }
    run([
        "qemu-system-x86_64", "-name", "imaged-demo",
        "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", memory,
        "-nodefaults", "-no-user-config", "-display", "none",
        "-kernel", guest / "vmlinuz", "-initrd", guest / "initrd.img",
        # On a busy host an emulated timer is late, which the kernel would take for a broken one.
        "-append", "root=/dev/vda1 rw console=ttyS0 quiet no_timer_check init=/sbin/lab-init",
        "-blockdev", json.dumps(block),
        "-device", "virtio-blk-pci,id=bootdisk,drive=boot",
        "-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0",
        "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=agent,path={vm.agent_socket},server=on,wait=off",
        "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        "-qmp", f"unix:{vm.qmp_socket},server=on,wait=off",
        "-serial", f"file:{vm.serial_log}",
        "-pidfile", vm.pid_file, "-daemonize",
        *qemu_args,
    ])  # fmt: skip


def run(command):
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise LabError(f"{command[0]} is missing: run tests/lab/need.sh test") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{command[0]} did not come back within 60 s") from None
    if done.returncode != 0:
        raise LabError(f"{command[0]} failed: {done.stderr.strip()}")


class Agent:
    """A connection to the guest agent, in step with it."""

    def __init__(self, vm, deadline):
        self.vm = vm
        self.deadline = deadline
        self.buffer = b""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(self.left())
        try:
            self.socket.connect(str(vm.agent_socket))
        except (FileNotFoundError, ConnectionRefusedError):
            raise LabError(vm.gone()) from None
        self.sync()

    def left(self):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def sync(self):
        """Answers to an earlier client may still be on their way: skip to ours."""
        ident = random.getrandbits(31)
        # The leading 0xFF ends what an earlier client may have sent half.
        self.socket.settimeout(self.left())
        self.socket.sendall(b"\xff")
        self.send("guest-sync-delimited", id=ident)
        while True:
            self.read_until(b"\xff")
            line = self.read_until(b"\n")
            try:
                if json.loads(line).get("return") == ident:
                    return
            except ValueError:
                pass  # a 0xFF amid an earlier client's bytes

    def send(self, command, **arguments):
        self.socket.settimeout(self.left())
        message = {"execute": command, "arguments": arguments}
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read_until(self, end):
        while end not in self.buffer:
            self.socket.settimeout(self.left())
            data = self.socket.recv(65536)
            if not data:
                raise LabError(self.vm.gone())
            self.buffer += data
        found, self.buffer = self.buffer.split(end, 1)
        return found

    def call(self, command, **arguments):
        self.send(command, **arguments)
        answer = json.loads(self.read_until(b"\n"))
        if "error" in answer:
            raise LabError(f"the agent refused {command}: {answer['error'].get('desc')}")
        return answer["return"]


def execute(vm, deadline, program, *arguments):
    agent = Agent(vm, deadline)
    pid = agent.call(
        "guest-exec", **{"path": program, "arg": list(arguments), "capture-output": True}
    )["pid"]
    while True:
        status = agent.call("guest-exec-status", pid=pid)
        if status["exited"]:
            break
        time.sleep(0.05)
        agent.left()
    output = [base64.b64decode(status.get(name, "")).decode() for name in ("out-data", "err-data")]
    if status.get("exitcode") != 0:
        raise LabError(f"{program} failed in the guest: {status.get('exitcode')}: {output[1]}")
    return output[0]


def qmp(vm, deadline, command):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(deadline - time.monotonic())
        connection.connect(str(vm.qmp_socket))
        stream = connection.makefile("rw")
        stream.readline()
        answer = {}
        for execute in ("qmp_capabilities", command):
            stream.write(json.dumps({"execute": execute}) + "\n")
            stream.flush()
            while not answer.keys() & {"return", "error"}:
                answer = json.loads(stream.readline())
            if "error" in answer:
                raise LabError(f"QEMU refused {execute}: {answer['error'].get('desc')}")
            result = answer.pop("return")
    return json.dumps(result)


def shutdown(vm, deadline):
    process = vm.pidfd()
    if process is None:
        raise LabError(vm.gone())
    agent = Agent(vm, deadline)
    agent.send("guest-shutdown", mode="powerdown")  # answers only when it fails
    if not select.select([process], [], [], agent.left())[0]:
        raise TimeoutError


def kill(vm, deadline):
    process = vm.pidfd()
    if process is None:
        return
    signal.pidfd_send_signal(process, signal.SIGKILL)
    if not select.select([process], [], [], deadline - time.monotonic())[0]:
        raise TimeoutError


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, timeout in (
        ("start", 60), ("wait-agent", 180), ("hostname", 30), ("exec", 60), ("qmp", 30),
        ("shutdown", 90), ("kill", 10),
    ):  # fmt: skip
        command = commands.add_parser(name)
        command.add_argument("--dir", required=True, help="the VM's run directory")
        if name != "start":
            command.add_argument("--timeout", type=float, default=timeout, help="seconds")
            if name == "qmp":
                command.add_argument("execute")
            if name == "exec":
                command.add_argument("program", nargs=argparse.REMAINDER)
            continue
        command.add_argument("--disk", required=True)
        command.add_argument("--format", required=True, choices=["raw", "qcow2"])
        command.add_argument("--snapshot", action="store_true", help="leave the disk as it is")
        command.add_argument("--memory", default="768M")
        command.add_argument("qemu_args", nargs="*", metavar="QEMU-ARGUMENT")
    args = parser.parse_args()

    vm = Vm(args.dir)
    if args.command == "start":
        start(vm, args.disk, args.format, args.snapshot, args.memory, args.qemu_args)
        return
    deadline = time.monotonic() + args.timeout
    try:
        if args.command == "wait-agent":
            Agent(vm, deadline)
        elif args.command == "hostname":
            print(Agent(vm, deadline).call("guest-get-host-name")["host-name"])
        elif args.command == "exec":
            print(execute(vm, deadline, *args.program), end="")
        elif args.command == "qmp":
            print(qmp(vm, deadline, args.execute), end="")
        elif args.command == "shutdown":
            shutdown(vm, deadline)
        else:
            kill(vm, deadline)
    except TimeoutError:
        raise LabError(
            f"{args.command}: nothing within {args.timeout:g} s; "
            f"the end of {vm.serial_log}:\n{vm.serial_tail()}"
        ) from None


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"vm.py: {error}")
