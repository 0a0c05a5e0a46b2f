//! Compiles the protos in Rust, so that no protoc needs to be installed.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    const PROTOS: [&str; 7] =
        ["snapshot", "work_request", "image", "instance", "host", "store", "volume"];
    println!("cargo::rerun-if-changed=proto");

    let files = PROTOS.map(|name| format!("proto/imaged/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["proto"])?;

    // For server reflection.
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("imaged.binpb"), encode(&descriptors))?;

    // What it holds may be a secret: see src/pb.rs.
    tonic_prost_build::configure()
        .skip_debug(["imaged.v1.ExportImageRequest"])
        .compile_fds(descriptors)?;
    Ok(())
}

fn encode(descriptors: &prost_types::FileDescriptorSet) -> Vec<u8> {
    prost::Message::encode_to_vec(descriptors)
}
