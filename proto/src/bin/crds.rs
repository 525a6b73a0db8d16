//! Writes the CustomResourceDefinitions into a directory: `crds DIR`.

use std::{error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: crds DIR")?;
    fs::create_dir_all(&dir)?;
    for (name, text) in lockstep_proto::crds::files()? {
        fs::write(dir.join(name), text)?;
    }
    Ok(())
}
