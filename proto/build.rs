//! Compiles the protocol with protox, a protobuf compiler in Rust: no protoc is needed to build.
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["jobs", "node", "worker"].map(|f| format!("proto/ramtorch/v1/{f}.proto"));
    let set = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("ramtorch_descriptor.bin");
    std::fs::write(&out, prost::Message::encode_to_vec(&set))?;
    tonic_prost_build::configure().build_server(true).build_client(true).compile_fds(set)?;
    Ok(())
}
