//! The script that verifies an image with nothing of imaged's.

use std::process::{Command, Output};

use super::*;

fn verify(dir: &Path, raw: &Path) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/verify-image.py");
    Command::new("python3").arg(script).arg(dir).arg(raw).output().unwrap()
}

/// A disk of 5 MiB and a bit: data, a hole, data that straddles extents.
fn disk() -> Vec<u8> {
    let mut disk = vec![0; (5 << 20) + 1536];
    let mut state = 1_u64;
    for at in (0..700_000).chain(2_500_000..3_300_000).chain((5 << 20)..((5 << 20) + 1536)) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        disk[at] = state.to_be_bytes()[0];
    }
    disk
}

#[tokio::test]
#[ignore = "needs qemu-img, python3 and b3sum"]
async fn qemu_the_script_in_the_docs_verifies_an_image() {
    let bench = Bench::new();
    let store = bench.store().await;
    let disk = disk();
    let [raw, qcow2] = ["raw", "qcow2"].map(|name| bench.temp.path().join(name));
    fs::write(&raw, &disk).unwrap();
    let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
    let made = Command::new("qemu-img").args(convert).args([&raw, &qcow2]).status().unwrap();
    assert!(made.success());
    fs::remove_file(&raw).unwrap();

    let object = fs::read(&qcow2).unwrap();
    let upload = store.begin(&id(1)).await.unwrap();
    let parts = || {
        let mut offset = 0;
        (1..).zip(object.chunks(300_000)).map(move |(number, bytes)| {
            let part = part(number, offset, InMemory::copy_of(bytes));
            offset += bytes.len() as u64;
            part
        })
    };
    for part in parts() {
        upload.put(part).await.unwrap();
    }
    let mut sealed = sealed(&id(1), &parts().collect::<Vec<_>>());
    let sums: Vec<u8> = parts().flat_map(|part| part.sha256.0).collect();
    let digests: Vec<u8> = disk.chunks(1 << 20).flat_map(|e| *blake3::hash(e).as_bytes()).collect();
    let stored = &mut sealed.manifest.stored;
    stored.virtual_size = ByteSize(disk.len() as u64);
    stored.object_digest = ObjectDigest(Sha256::digest(&sums).into());
    stored.content_digest = ContentDigest(*blake3::hash(&digests).as_bytes());
    sealed.extent_digests = digests;
    upload.seal(Arc::new(sealed.clone())).await.unwrap();

    let dir = bench.dir(&id(1));
    let good = verify(&dir, &raw);
    assert!(good.status.success(), "{good:?}");
    assert!(String::from_utf8_lossy(&good.stdout).ends_with("both digests match\n"), "{good:?}");
    assert!(fs::read(&raw).unwrap() == disk);

    let manifest = fs::read_to_string(dir.join(MANIFEST)).unwrap();
    let content = sealed.manifest.stored.content_digest.to_string();
    let other = manifest.replace(&content, &content.chars().rev().collect::<String>());
    fs::write(dir.join(MANIFEST), other).unwrap();
    let bad = verify(&dir, &raw);
    assert!(!bad.status.success());
    assert!(String::from_utf8_lossy(&bad.stderr).contains("STORED: contentDigest differ"));

    fs::write(dir.join(MANIFEST), manifest).unwrap();
    let mut longer = object.clone();
    longer.extend([0; 512]);
    fs::write(dir.join(OBJECT), longer).unwrap();
    let bad = verify(&dir, &raw);
    assert!(String::from_utf8_lossy(&bad.stderr).contains("bytes after the last part differ"));

    let mut flipped = object;
    // In the header's unused space: only the object's digest can tell.
    flipped[4096] ^= 1;
    fs::write(dir.join(OBJECT), flipped).unwrap();
    let bad = verify(&dir, &raw);
    assert!(
        String::from_utf8_lossy(&bad.stderr).contains("STORED: objectDigest differ"),
        "{bad:?}"
    );
}
