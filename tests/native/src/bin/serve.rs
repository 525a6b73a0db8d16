//! Serves volumes from leg directories, in a process that tests and benchmarks can measure and kill: the datapath without CSI around it.
//!
//! `serve HOLDER [VOLUME-ID WITNESS RUN-DIR N LEG-DIR{N}]...` prints the block devices, one a line, and closes the volumes when its standard input
//! ends. HOLDER: the socket of a FUSE holder, or nothing (an empty argument).

use std::{error::Error, io::Read, path::PathBuf, time::Duration};

use lockstep_datapath::{Datapath, Holder, LegPath, VolumeSpec, core::units::VolumeId};

fn specs(mut args: impl Iterator<Item = String>) -> Result<Vec<VolumeSpec>, Box<dyn Error>> {
    let mut specs = Vec::new();
    while let Some(volume) = args.next() {
        let mut next = || args.next().ok_or("an argument is missing: VOLUME-ID WITNESS RUN-DIR N LEG-DIR...");
        let volume = VolumeId(*uuid::Uuid::parse_str(&volume)?.as_bytes());
        let (witness, run_dir) = (PathBuf::from(next()?), PathBuf::from(next()?));
        let legs = next()?.parse()?;
        let legs = (0..legs).map(|_| Ok(LegPath { dir: next()?.into() })).collect::<Result<_, &str>>()?;
        specs.push(VolumeSpec { volume, legs, witness, seen_epoch: None, force: None, run_dir });
    }
    Ok(specs)
}

fn main() -> Result<(), Box<dyn Error>> {
    lockstep_datapath::errand::serve(&[]);
    tracing_subscriber::fmt().with_env_filter("warn").with_writer(std::io::stderr).init();
    let mut args = std::env::args().skip(1);
    let holder = args.next().filter(|path| !path.is_empty());
    let holder = holder.map(|path| Holder::connect(path.as_ref(), "serve", Duration::from_secs(10))).transpose()?;
    let specs = specs(args)?;
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(async {
        let datapath = Datapath::start(1, holder)?;
        let mut volumes = Vec::new();
        for spec in specs {
            let volume = datapath.open(spec).await?;
            println!("{}", volume.device().display());
            volumes.push(volume);
        }
        tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
        for volume in volumes {
            volume.close().await?;
        }
        Ok(())
    })
}
