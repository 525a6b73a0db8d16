//! `make bench`: the mirror against its peers on the same disks, in the same run, in turn. Ratios first; the figures of one machine mean
//! little on another.
//!
//! `bench [ROUNDS [SECONDS]]`

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use comfy_table::{Table, presets::ASCII_MARKDOWN};
use lockstep_native::{Rig, Server, run};

const MIB: u64 = 512;
/// Name, fio's options. `fresh` ones are first on legs that were never written.
const WORKLOADS: [(&str, &[&str]); 8] = [
    ("1 MiB seq write, fresh", &["--rw=write", "--bs=1M", "--iodepth=8", "--size=256M", "--io_size=256M"]),
    ("4k rand write QD32, fresh", &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--offset=256M", "--size=256M", "--io_size=64M"]),
    ("4k rand write QD1", &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--time_based"]),
    ("4k rand write QD32", &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--time_based"]),
    ("4k rand read QD1", &["--rw=randread", "--bs=4k", "--iodepth=1", "--time_based"]),
    ("4k rand read QD32", &["--rw=randread", "--bs=4k", "--iodepth=32", "--time_based"]),
    ("1 MiB seq write", &["--rw=write", "--bs=1M", "--iodepth=8", "--time_based"]),
    ("1 MiB seq read", &["--rw=read", "--bs=1M", "--iodepth=8", "--time_based"]),
];
const SYNCED: (&str, &[&str]) = ("4k write + fsync", &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1", "--time_based"]);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Contender {
    File,
    Loop,
    Qemu,
    Lockstep,
}

impl Contender {
    const ALL: [Self; 4] = [Self::File, Self::Loop, Self::Qemu, Self::Lockstep];

    const fn name(self) -> &'static str {
        match self {
            Self::File => "one leg's file",
            Self::Loop => "loop on one leg",
            Self::Qemu => "qemu quorum",
            Self::Lockstep => "Lockstep",
        }
    }
}

/// A contender that is up.
enum Running {
    Plain,
    Loop(String),
    Qemu(Child, String, PathBuf),
    Lockstep(Server),
}

fn text(path: &Path) -> String {
    path.to_str().expect("the rig's paths are text").to_owned()
}

fn loop_on(path: &Path) -> String {
    run("losetup", &["--find", "--show", "--direct-io=on", "--sector-size=4096", &text(path)]).trim().to_owned()
}

fn start(contender: Contender, rig: &Rig, id: u8) -> (Running, String) {
    let spec = rig.new_volume(id, MIB);
    let data = spec.legs[0].dir.join("data");
    match contender {
        Contender::File => (Running::Plain, text(&data)),
        Contender::Loop => {
            let device = loop_on(&data);
            (Running::Loop(device.clone()), device)
        }
        Contender::Qemu => {
            let mount = rig.dir().join(format!("qemu{id}"));
            std::fs::write(&mount, "").expect("a mount point");
            let file =
                |node: &str, data: &Path| format!("driver=file,node-name={node},filename={},cache.direct=on,aio=io_uring", data.display());
            let mut child = Command::new("qemu-storage-daemon")
                .args(["--blockdev", &file("a", &data), "--blockdev", &file("b", &spec.legs[1].dir.join("data"))])
                .args(["--blockdev", "driver=quorum,node-name=q,vote-threshold=1,read-pattern=fifo,children.0=a,children.1=b"])
                .args(["--export", &format!("type=fuse,id=e,node-name=q,mountpoint={},writable=on", mount.display())])
                .stdin(Stdio::null())
                .spawn()
                .expect("qemu-storage-daemon is installed");
            while std::fs::metadata(&mount).map_or(0, |meta| meta.len()) != MIB << 20 {
                assert!(child.try_wait().expect("it was started").is_none(), "qemu-storage-daemon ended");
                std::thread::sleep(Duration::from_millis(20));
            }
            let device = loop_on(&mount);
            (Running::Qemu(child, device.clone(), mount), device)
        }
        Contender::Lockstep => {
            let program = std::env::current_exe().expect("our own path").with_file_name("serve");
            let server = Server::start(&text(&program), &[spec]);
            let device = text(&server.devices[0]);
            (Running::Lockstep(server), device)
        }
    }
}

fn stop(running: Running) {
    match running {
        Running::Plain => {}
        Running::Loop(device) => drop(run("losetup", &["-d", &device])),
        Running::Qemu(child, device, mount) => {
            run("losetup", &["-d", &device]);
            run("kill", &[&child.id().to_string()]);
            drop(child.wait_with_output());
            lockstep_native::succeeds("umount", &["-l", &text(&mount)]);
        }
        Running::Lockstep(server) => server.stop(),
    }
}

/// Operations a second.
fn fio(target: &str, options: &[&str], seconds: &str) -> f64 {
    let (filename, runtime) = (format!("--filename={target}"), format!("--runtime={seconds}"));
    let fixed = ["--name=bench", &filename, &runtime, "--direct=1", "--ioengine=libaio", "--output-format=json", "--randrepeat=1"];
    let output = run("fio", &[&fixed, options].concat());
    let json: serde_json::Value = serde_json::from_str(&output[output.find('{').unwrap_or(0)..]).expect("fio prints JSON");
    let iops = |kind: &str| json["jobs"][0][kind]["iops"].as_f64().unwrap_or(0.0);
    iops("read") + iops("write")
}

fn median(values: &[f64]) -> (f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    (median, (sorted[sorted.len() - 1] - sorted[0]) / median.max(f64::MIN_POSITIVE) * 50.0)
}

/// What fifty idle volumes cost, each, and what a busy one adds, in KiB.
fn memory() -> (u64, u64) {
    const IDLE: u8 = 50;
    let program = text(&std::env::current_exe().expect("our own path").with_file_name("serve"));
    let rig = Rig::new(2, 50 * 16 + 400);
    let specs: Vec<_> = (1..=IDLE).map(|id| rig.new_volume(id, 16)).collect();
    let pss = |specs: &[_]| {
        let server = Server::start(&program, specs);
        std::thread::sleep(Duration::from_secs(1));
        (server.pss(), server)
    };
    let (none, server) = pss(&[]);
    server.stop();
    let (fifty, server) = pss(&specs);
    server.stop();
    let (one, server) = pss(&specs[..1]);
    fio(&text(&server.devices[0]), &["--rw=randwrite", "--bsrange=4k-1M", "--iodepth=32", "--time_based"], "2");
    let busy = server.pss();
    server.stop();
    (fifty.saturating_sub(none) / u64::from(IDLE), busy.saturating_sub(one))
}

fn main() {
    let mut args = std::env::args().skip(1);
    let rounds: u8 = args.next().map_or(3, |n| n.parse().expect("ROUNDS is a number"));
    let seconds = args.next().unwrap_or("3".into());
    let workloads: Vec<_> = WORKLOADS.into_iter().chain([SYNCED]).collect();
    let mut results: BTreeMap<(usize, Contender), Vec<f64>> = BTreeMap::new();
    let progress = indicatif::ProgressBar::new(u64::from(rounds) * Contender::ALL.len() as u64 * workloads.len() as u64);
    progress.set_style(indicatif::ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} (eta {eta})").expect("a template"));
    for round in 0..rounds {
        for turn in 0..Contender::ALL.len() {
            // Who is first changes from round to round.
            let contender = Contender::ALL[(turn + usize::from(round)) % Contender::ALL.len()];
            let rig = Rig::new(2, 800);
            let (running, target) = start(contender, &rig, 1);
            for (index, (name, options)) in workloads.iter().enumerate() {
                progress.set_message(format!("{}: {name}", contender.name()));
                results.entry((index, contender)).or_default().push(fio(&target, options, &seconds));
                progress.inc(1);
            }
            stop(running);
        }
    }
    progress.finish_and_clear();
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(["", "Lockstep / qemu", "Lockstep / loop", "Lockstep", "qemu quorum", "loop on one leg", "one leg's file"]);
    for (index, (name, _)) in workloads.iter().enumerate() {
        let of = |contender| median(&results[&(index, contender)]);
        let cell = |contender| format!("{:.0} ±{:.0}%", of(contender).0, of(contender).1);
        let ratio = |contender| format!("{:.2}", of(Contender::Lockstep).0 / of(contender).0);
        table.add_row([
            (*name).to_owned(),
            ratio(Contender::Qemu),
            ratio(Contender::Loop),
            cell(Contender::Lockstep),
            cell(Contender::Qemu),
            cell(Contender::Loop),
            cell(Contender::File),
        ]);
    }
    println!("Operations a second, median of {rounds} rounds ± half the spread; {seconds} s each, 2 disks, {MIB} MiB\n{table}");
    let (idle, busy) = memory();
    println!(
        "Memory: {:.2} MiB an idle volume ((Pss with 50 - with none) / 50), {:.1} MiB more for a busy one",
        idle as f64 / 1024.0,
        busy as f64 / 1024.0
    );
}
