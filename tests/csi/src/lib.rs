//! Both binaries on real disks, driven by a CSI client.
//!
//! ```text
//! lab: blank disks (images on loop devices) -- failed from below by the kernel
//! driver: csi-node and csi-controller as ordinary processes, in standalone mode, started, stopped, killed
//! client: the calls that Kubernetes would make, over the two sockets
//! ```

pub mod client;
pub mod driver;
pub mod kills;
pub mod lab;
pub mod load;
pub mod memory;

/// What this machine cannot show is said, and counted by `tests/run`, which names the file for it.
pub fn skipped(what: &str, why: &str) {
    println!("SKIPPED: {what}: {why}");
    if let Some(path) = std::env::var_os("LOCKSTEP_SKIPPED") {
        let mut file = std::fs::File::options().create(true).append(true).open(path).expect("the file of what is skipped");
        std::io::Write::write_all(&mut file, format!("{what}: {why}\n").as_bytes()).expect("it takes a line");
    }
}
