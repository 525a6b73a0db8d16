//! Compiles the .proto files with a compiler in Rust, so that no protoc is needed; the code goes to OUT_DIR.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=csi.proto");
    println!("cargo:rerun-if-changed=registration.proto");
    let files = protox::compile(["csi.proto", "registration.proto"], ["."])?;
    // Calls that a service leaves out are answered with UNIMPLEMENTED.
    tonic_prost_build::configure().btree_map(".").generate_default_stubs(true).compile_fds(files)?;
    Ok(())
}
