//! Work for a mounted volume: many writers that overlap, some that verify what they wrote, and a copy of files.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::lab::text;

/// A running fio.
#[derive(Debug)]
pub struct Load(Child);

/// Direct I/O for this many seconds on files under `dir`: twelve jobs whose writes overlap, and two that verify ranges of their own.
pub fn on_files(dir: &Path, seconds: u32) -> Load {
    start(
        &format!("--filename={}", text(&dir.join("overlap"))),
        &format!("--filename={}", text(&dir.join("verify"))),
        seconds,
        ["0", "64M", "0"],
    )
}

/// The same on a bare device.
pub fn on_device(device: &Path, seconds: u32) -> Load {
    let device = format!("--filename={}", text(device));
    start(&device, &device, seconds, ["64M", "128M", "192M"])
}

fn start(overlap: &str, verify: &str, seconds: u32, offsets: [&str; 3]) -> Load {
    let runtime = format!("--runtime={seconds}");
    let [first, second, third] = offsets.map(|offset| format!("--offset={offset}"));
    let own = |name: &'static str| {
        [
            name,
            verify,
            "--rw=randwrite",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--iodepth=8",
            "--bsrange=4k-64k",
            "--size=32M",
        ]
    };
    let child = Command::new("fio")
        // fio would leave its verify states in the working directory.
        .args(["--verify_state_save=0", "--direct=1", "--ioengine=libaio", "--time_based=1", "--output-format=terse", "--fallocate=none"])
        .arg(runtime)
        .args(own("--name=own1"))
        .arg(&first)
        .args(own("--name=own2"))
        .arg(&second)
        .args([
            "--name=overlap",
            overlap,
            &third,
            "--numjobs=12",
            "--size=16M",
            "--rw=randrw",
            "--rwmixread=20",
            "--iodepth=8",
            "--bsrange=4k-128k",
        ])
        .stdout(Stdio::null())
        .spawn()
        .expect("fio is installed");
    Load(child)
}

impl Load {
    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.0.try_wait().expect("fio was started").is_none()
    }

    /// Waits for its end. `false`: it got an error, or read what it did not write.
    pub fn succeeded(mut self) -> bool {
        self.0.wait().expect("fio was started").success()
    }
}
