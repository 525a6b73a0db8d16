//! `make bench`: the mirror against its peers, each on two disks of its own of the same kind, in the same run, in turn. Ratios first; the figures
//! of one machine mean little on another.
//!
//! `bench [ROUNDS [SECONDS [NAME]]]`: of the workloads only those whose name has NAME in it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use comfy_table::{Table, presets::ASCII_MARKDOWN};
use lockstep_native::{Rig, Server, run};

const MIB: u64 = 512;
/// Name, fio's options.
type Workload = (&'static str, &'static [&'static str]);
/// On legs that were never written.
const FRESH: [Workload; 2] = [
    ("1 MiB seq write, fresh", &["--rw=write", "--bs=1M", "--iodepth=8", "--size=256M", "--io_size=256M"]),
    ("4k rand write QD32, fresh", &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--offset=256M", "--size=256M", "--io_size=64M"]),
];
/// Writes the rest, so that what follows overwrites.
const FILL: &[&str] = &["--rw=write", "--bs=1M", "--iodepth=4"];
const OVERWRITTEN: [Workload; 7] = [
    ("4k rand write QD1", &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--time_based"]),
    ("4k rand write QD32", &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--time_based"]),
    ("4k rand read QD1", &["--rw=randread", "--bs=4k", "--iodepth=1", "--time_based"]),
    ("4k rand read QD32", &["--rw=randread", "--bs=4k", "--iodepth=32", "--time_based"]),
    ("1 MiB seq write", &["--rw=write", "--bs=1M", "--iodepth=8", "--time_based"]),
    ("1 MiB seq read", &["--rw=read", "--bs=1M", "--iodepth=8", "--time_based"]),
    ("4k write + fsync", &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1", "--time_based"]),
];
/// What each disk of the second table can do in a second: bytes and operations, reads and writes apart.
const LIMITS: (u64, u64) = (500 << 20, 50_000);
const LIMITED: [Workload; 4] = [OVERWRITTEN[1], OVERWRITTEN[3], OVERWRITTEN[4], OVERWRITTEN[5]];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Contender {
    File,
    /// fio writes the files of both legs at once: what no mirror of these disks can beat on this machine.
    Both,
    Loop,
    Qemu,
    Lockstep,
    /// With a FUSE holder, as csi-node runs: its volumes survive the end of the process.
    Held,
}

impl Contender {
    const ALL: [Self; 6] = [Self::File, Self::Both, Self::Loop, Self::Qemu, Self::Lockstep, Self::Held];

    const fn name(self) -> &'static str {
        match self {
            Self::File => "one leg's file",
            Self::Both => "both legs' files",
            Self::Loop => "loop on one leg",
            Self::Qemu => "qemu quorum",
            Self::Lockstep => "Lockstep",
            Self::Held => "Lockstep, held",
        }
    }
}

/// A contender that is up.
enum Running {
    Plain,
    Loop(String),
    Qemu(Child, String, PathBuf),
    Lockstep(Server, Option<Child>),
}

fn text(path: &Path) -> String {
    path.to_str().expect("the rig's paths are text").to_owned()
}

/// A program that was built with this one.
fn beside(name: &str) -> PathBuf {
    std::env::current_exe().expect("our own path").with_file_name(name)
}

fn loop_on(path: &Path) -> String {
    run("losetup", &["--find", "--show", "--direct-io=on", "--sector-size=4096", &text(path)]).trim().to_owned()
}

fn start(contender: Contender, rig: &Rig, id: u8) -> (Running, Vec<String>) {
    let spec = rig.new_volume(id, MIB);
    let data = spec.legs[0].dir.join("data");
    match contender {
        Contender::File => (Running::Plain, vec![text(&data)]),
        Contender::Both => (Running::Plain, vec![text(&data), text(&spec.legs[1].dir.join("data"))]),
        Contender::Loop => {
            let device = loop_on(&data);
            (Running::Loop(device.clone()), vec![device])
        }
        Contender::Qemu => {
            let mount = rig.dir().join(format!("qemu{id}"));
            std::fs::write(&mount, "").expect("a mount point");
            let file =
                |node: &str, data: &Path| format!("driver=file,node-name={node},filename={},cache.direct=on,aio=io_uring", data.display());
            // It ends when we do, however that is.
            let mut child = Command::new("setpriv")
                .args(["--pdeathsig", "TERM", "qemu-storage-daemon"])
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
            (Running::Qemu(child, device.clone(), mount), vec![device])
        }
        Contender::Lockstep | Contender::Held => {
            let socket = (contender == Contender::Held).then(|| rig.dir().join("holder.sock"));
            let holder = socket.as_ref().map(|socket| {
                let holder =
                    Command::new("setpriv").args(["--pdeathsig", "TERM"]).arg(beside("fuse-holder")).arg("--socket").arg(socket).spawn();
                holder.expect("fuse-holder is built")
            });
            let server = Server::start(&text(&beside("serve")), socket.as_deref(), &[spec]);
            let device = text(&server.devices[0]);
            (Running::Lockstep(server, holder), vec![device])
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
        Running::Lockstep(server, holder) => {
            server.stop();
            if let Some(mut holder) = holder {
                run("kill", &[&holder.id().to_string()]);
                drop(holder.wait());
            }
        }
    }
}

/// Operations a second; one on each of several targets counts as one, as it does for a mirror.
fn fio(targets: &[String], options: &[&str], seconds: &str) -> f64 {
    let runtime = format!("--runtime={seconds}");
    let global = [&runtime, "--direct=1", "--ioengine=libaio", "--output-format=json", "--randrepeat=1"];
    let jobs: Vec<String> = targets.iter().flat_map(|target| ["--name=bench".into(), format!("--filename={target}")]).collect();
    let jobs: Vec<&str> = jobs.iter().map(String::as_str).collect();
    let output = run("fio", &[&global, options, &jobs].concat());
    let json: serde_json::Value = serde_json::from_str(&output[output.find('{').unwrap_or(0)..]).expect("fio prints JSON");
    let jobs = json["jobs"].as_array().expect("fio names its jobs");
    let iops = |job: &serde_json::Value, kind: &str| job[kind]["iops"].as_f64().unwrap_or(0.0);
    jobs.iter().map(|job| iops(job, "read") + iops(job, "write")).sum::<f64>() / targets.len() as f64
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
    let program = text(&beside("serve"));
    let rig = Rig::new(2, 50 * 16 + 400);
    let specs: Vec<_> = (1..=IDLE).map(|id| rig.new_volume(id, 16)).collect();
    let pss = |specs: &[_]| {
        let server = Server::start(&program, None, specs);
        std::thread::sleep(Duration::from_secs(1));
        (server.pss(), server)
    };
    let (none, server) = pss(&[]);
    server.stop();
    let (fifty, server) = pss(&specs);
    server.stop();
    let (one, server) = pss(&specs[..1]);
    fio(&[text(&server.devices[0])], &["--rw=randwrite", "--bsrange=4k-1M", "--iodepth=32", "--time_based"], "2");
    let busy = server.pss();
    server.stop();
    (fifty.saturating_sub(none) / u64::from(IDLE), busy.saturating_sub(one))
}

/// What the user asked for.
struct Plan {
    seconds: String,
    only: String,
}

impl Plan {
    fn wants(&self, (name, _): &Workload) -> bool {
        name.contains(&self.only)
    }
}

/// By row: what each contender did in each round.
type Results = BTreeMap<usize, Vec<[f64; Contender::ALL.len()]>>;

/// All contenders are up at once, each on disks of its own, and take turns at each workload, so that a machine that is busy with something
/// else is so for all of them.
fn round(number: usize, plan: &Plan, results: &mut Results, limited: &mut Results, progress: &indicatif::ProgressBar) {
    let up = Contender::ALL.map(|contender| {
        let rig = Rig::new(2, 800);
        let (running, target) = start(contender, &rig, 1);
        (contender, rig, running, target)
    });
    let take_turns = |results: &mut Results, first: usize, workloads: &[Workload]| {
        for (index, (name, options)) in workloads.iter().enumerate().filter(|(_, workload)| plan.wants(workload)) {
            let mut figures = [0.0; Contender::ALL.len()];
            for turn in 0..up.len() {
                // Who is first changes from round to round.
                let (contender, _, _, target) = &up[(turn + number) % up.len()];
                progress.set_message(format!("{}: {name}", contender.name()));
                figures[*contender as usize] = fio(target, options, &plan.seconds);
                progress.inc(1);
            }
            results.entry(first + index).or_default().push(figures);
        }
    };
    take_turns(results, 0, &FRESH);
    for (.., target) in &up {
        fio(target, FILL, "60");
    }
    take_turns(results, FRESH.len(), &OVERWRITTEN);
    if up.iter().all(|(_, rig, ..)| rig.limit_disks(LIMITS.0, LIMITS.1)) {
        take_turns(limited, 0, &LIMITED);
        for (_, rig, ..) in &up {
            rig.limit_disks(0, 0);
        }
    }
    for (_, _rig, running, _) in up {
        stop(running);
    }
}

fn table(workloads: &[Workload], results: &Results) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header([
        "",
        "Lockstep / qemu",
        "Lockstep / loop",
        "Lockstep / both",
        "held / not",
        "Lockstep",
        "qemu quorum",
        "loop on one leg",
        "both legs' files",
        "one leg's file",
    ]);
    for (index, (name, _)) in workloads.iter().enumerate() {
        let Some(rounds) = results.get(&index) else { continue };
        let of = |figure: &dyn Fn(&[f64; Contender::ALL.len()]) -> f64| median(&rounds.iter().map(figure).collect::<Vec<f64>>());
        let cell = |contender: Contender| {
            let (median, spread) = of(&|round| round[contender as usize]);
            format!("{median:.0} ±{spread:.0}%")
        };
        let ratio = |of_which: Contender, to: Contender| {
            let (median, spread) = of(&|round| round[of_which as usize] / round[to as usize]);
            format!("{median:.2} ±{spread:.0}%")
        };
        table.add_row([
            (*name).to_owned(),
            ratio(Contender::Lockstep, Contender::Qemu),
            ratio(Contender::Lockstep, Contender::Loop),
            ratio(Contender::Lockstep, Contender::Both),
            ratio(Contender::Held, Contender::Lockstep),
            cell(Contender::Lockstep),
            cell(Contender::Qemu),
            cell(Contender::Loop),
            cell(Contender::Both),
            cell(Contender::File),
        ]);
    }
    table
}

fn main() {
    let mut args = std::env::args().skip(1);
    let rounds: usize = args.next().map_or(5, |n| n.parse().expect("ROUNDS is a number"));
    let plan = Plan { seconds: args.next().unwrap_or("1".into()), only: args.next().unwrap_or_default() };
    let qemu = run("qemu-storage-daemon", &["--version"]);
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{}{}, {cpus} CPUs, {}", run("date", &["--utc"]), run("uname", &["-sr"]).trim(), qemu.lines().next().unwrap_or_default());
    let workloads = [FRESH.as_slice(), &OVERWRITTEN].concat();
    let (mut results, mut limited) = (Results::new(), Results::new());
    let wanted = workloads.iter().chain(&LIMITED).filter(|workload| plan.wants(workload)).count();
    let runs = rounds * Contender::ALL.len() * wanted;
    let progress = indicatif::ProgressBar::new(runs as u64);
    progress.set_style(indicatif::ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} (eta {eta})").expect("a template"));
    for number in 0..rounds {
        round(number, &plan, &mut results, &mut limited, &progress);
    }
    progress.finish_and_clear();
    let how = format!("median of {rounds} rounds ± half the spread, {} s each", plan.seconds);
    println!("\nOperations a second, {how}; {MIB} MiB on 2 disks\n{}", table(&workloads, &results));
    let (bytes, operations) = LIMITS;
    let limits = format!("each disk limited to {} MiB/s and {operations} operations/s, reads and writes apart", bytes >> 20);
    if !LIMITED.iter().any(|workload| plan.wants(workload)) {
        // Nobody asked.
    } else if limited.is_empty() {
        println!("\nSKIPPED: {limits}: this kernel has no blkio throttling");
    } else {
        println!("\nThe same, {limits}\n{}", table(&LIMITED, &limited));
    }
    let (idle, busy) = memory();
    println!(
        "\nMemory: {:.2} MiB an idle volume ((Pss with 50 - with none) / 50), {:.1} MiB more for a busy one",
        idle as f64 / 1024.0,
        busy as f64 / 1024.0
    );
}
