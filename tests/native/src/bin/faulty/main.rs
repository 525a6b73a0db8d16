//! `faulty BACKING MOUNT SEED DEPTH`: serves a directory of files that fail as the lines on standard input say (`lockstep_native::faulty`).
//! Ends when its standard input does; whatever is in flight then fails.

mod fates;
mod files;

use std::{
    error::Error,
    io::{BufRead, Write},
    path::Path,
    sync::Arc,
};

use fates::Fates;
use fuser::{Config, MountOption, Session};
use lockstep_native::faulty::Order;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [backing, mount, seed, depth] = arguments.as_slice() else { return Err("BACKING MOUNT SEED DEPTH".into()) };
    let fates = Arc::new(Fates::new(seed.parse()?));
    let files = files::Files::new(Path::new(backing), depth.parse()?, Arc::clone(&fates));
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("lockstep-faulty".into())];
    let session = Session::new(files, mount, &config)?.spawn()?;
    for _ in 0..fates::WORKERS {
        let fates = Arc::clone(&fates);
        std::thread::spawn(move || fates.work());
    }
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    for line in std::io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Order::Arm(faults) => fates.arm(faults),
            Order::Release => fates.release(),
            Order::Count => serde_json::to_string(&fates.counts())?,
        };
        writeln!(out, "{answer}")?;
    }
    // Unmounting could wait for what is held. The end of the process fails it.
    std::mem::forget(session);
    Ok(())
}
