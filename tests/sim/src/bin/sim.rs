//! Runs seeds of the simulator on every core and reports what they reached. See `--help`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Parser;
use lockstep_sim::simulator::{Broken, Summary, Watch, explain, regressions, run_seed};

/// Random histories of one mirror on simulated disks. Every seed replays exactly, for one commit.
///
/// Ends with a table of what was reached (state x effect x how it ended; a letter says which rule keeps a cell empty), counts of
/// operations, faults and crashes by kind, medians per seed, and one line: N passed, N failed, N skipped. The first seed that fails is
/// explained: the oracle, a minimal script, what happened. A kind that was never reached fails the run, and from 4,000 seeds on a cell that is
/// empty for no reason.
#[derive(Parser)]
#[command(name = "sim")]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first one.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Begins with a seed made of the time instead; it is printed.
    #[arg(long, conflicts_with = "first")]
    fresh: bool,
    /// As many as there is time for, in seconds, instead of a number of seeds.
    #[arg(long, conflicts_with = "seeds")]
    seconds: Option<u64>,
    /// One seed, and what happened in it if it fails.
    #[arg(long, conflicts_with_all = ["seeds", "first", "fresh", "seconds"])]
    seed: Option<u64>,
    /// The seeds that once found something (tests/sim/regressions.txt).
    #[arg(long, conflicts_with_all = ["seeds", "first", "fresh", "seconds", "seed"])]
    regressions: bool,
    /// What the oracles see from outside only, without the core's own assertions.
    #[arg(long)]
    oracles: bool,
    /// Does not end with the first seed that fails; a line for each.
    #[arg(long)]
    go_on: bool,
    /// Nothing of what was reached, only what failed.
    #[arg(long)]
    quiet: bool,
    /// Does not look for a minimal script of the first seed that fails.
    #[arg(long)]
    no_script: bool,
    /// Runs at once; 0: one a core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// So many looks at a seed that still runs: two minutes, and a seed takes some milliseconds. No time, since this process may be stopped for a while.
const ENDLESS: u32 = 6000;
/// How long until the next look at what runs.
const LOOK: Duration = Duration::from_millis(20);

/// What all threads share.
struct Run {
    watch: Watch,
    go_on: bool,
    until: Option<Instant>,
    /// Which of the seeds is next, and the first one that need not be run any more.
    next: AtomicU64,
    end: AtomicU64,
    done: AtomicU64,
    /// What runs: which seed, and how often that was seen.
    running: Mutex<BTreeMap<u64, u32>>,
    found: Mutex<(Summary, BTreeMap<u64, Broken>)>,
}

impl Run {
    /// A seed that runs for far longer than any should.
    fn endless(&self) -> Option<u64> {
        let mut running = self.running.lock().expect("no thread panics");
        running.values_mut().for_each(|looks| *looks += 1);
        running.iter().find(|(_, looks)| **looks >= ENDLESS).map(|(seed, _)| *seed)
    }

    /// Takes seeds until there are none left.
    fn work(&self, seed_of: impl Fn(u64) -> u64) {
        let mut summary = Summary::default();
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n >= self.end.load(Ordering::Relaxed) || self.until.is_some_and(|until| Instant::now() >= until) {
                break;
            }
            let seed = seed_of(n);
            self.running.lock().expect("no thread panics").insert(seed, 0);
            let (coverage, broken) = run_seed(seed, self.watch);
            self.running.lock().expect("no thread panics").remove(&seed);
            self.done.fetch_add(1, Ordering::Relaxed);
            let Some(broken) = broken else {
                summary.add(&coverage);
                continue;
            };
            if self.go_on {
                println!("{}", told(seed, n, &broken));
            }
            self.found.lock().expect("no thread panics").1.insert(n, broken);
            if !self.go_on {
                // Those before it are finished: the first one that fails does not depend on the threads.
                self.end.fetch_min(n, Ordering::Relaxed);
            }
        }
        self.found.lock().expect("no thread panics").0.merge(summary);
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A panic of the core is an oracle's finding like others.
    std::panic::set_hook(Box::new(|_| ()));
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let first = if arguments.fresh { since_epoch * 1_000_000 } else { arguments.first };
    let list: Vec<u64> = match (arguments.seed, arguments.regressions) {
        (Some(seed), _) => vec![seed],
        (None, true) => regressions().map(|(seed, _)| seed).collect(),
        (None, false) => Vec::new(),
    };
    let seeds = match arguments.seconds {
        _ if !list.is_empty() => list.len() as u64,
        Some(_) => u64::MAX,
        None => arguments.seeds,
    };
    let seed_of = |n: u64| list.get(n as usize).copied().unwrap_or(first.wrapping_add(n));
    if list.is_empty() {
        println!("seeds from {first}");
    }
    let start = Instant::now();
    let run = Run {
        watch: if arguments.oracles { Watch::Oracles } else { Watch::Invariants },
        go_on: arguments.go_on || arguments.regressions,
        until: arguments.seconds.map(|seconds| start + Duration::from_secs(seconds)),
        next: AtomicU64::new(0),
        end: AtomicU64::new(seeds),
        done: AtomicU64::new(0),
        running: Mutex::default(),
        found: Mutex::default(),
    };
    let threads = match arguments.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(seeds as usize)).map(|_| scope.spawn(|| run.work(seed_of))).collect();
        let mut told = start;
        while workers.iter().any(|worker| !worker.is_finished()) {
            std::thread::sleep(LOOK);
            if let Some(seed) = run.endless() {
                // The core does not come back: no thread can be ended.
                println!(
                    "seed {seed}: every request ends (mirror rules 4, 27): it runs without end (number {})",
                    seed.wrapping_sub(first) + 1
                );
                println!("{} passed, 1 failed, 0 skipped", run.done.load(Ordering::Relaxed));
                std::process::exit(1);
            }
            if told.elapsed() >= Duration::from_secs(30) {
                told = Instant::now();
                let (done, seconds) = (run.done.load(Ordering::Relaxed), start.elapsed().as_secs_f64());
                eprintln!("{done} seeds in {seconds:.0} s");
            }
        }
    });
    let done = run.done.load(Ordering::Relaxed);
    let (summary, failed) = run.found.into_inner().expect("no thread panics");
    if !arguments.quiet {
        print!("{}", report(&summary));
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{done} seeds, {} events in {seconds:.1} s: {:.0} seeds/s", summary.coverage.events, done as f64 / seconds);
    let mut missing = Vec::new();
    if let (Some((n, broken)), false) = (failed.first_key_value(), run.go_on) {
        println!("{}\nat commit {}", told(seed_of(*n), *n, broken), commit());
        if !arguments.no_script {
            println!("{}", explain(seed_of(*n), run.watch).unwrap_or_default());
        }
    } else if list.is_empty() {
        missing = if arguments.seconds.is_some() && done < 1000 { Vec::new() } else { summary.missing() };
        missing.iter().for_each(|what| println!("never reached: {what}"));
    }
    let forbidden = summary.coverage.forbidden();
    forbidden.iter().for_each(|cell| println!("reached: {cell}"));
    let failed = failed.len() + missing.len() + forbidden.len();
    println!("{} passed, {failed} failed, 0 skipped", summary.seeds());
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// A seed replays for one commit only.
fn commit() -> String {
    let git = std::process::Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    let name = git.ok().filter(|output| output.status.success()).map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    name.unwrap_or_else(|| "unknown: this is no clone".into())
}

/// One line, whatever the oracle saw.
fn told(seed: u64, n: u64, broken: &Broken) -> String {
    format!("seed {seed}: {} ({}): {} (number {})", broken.oracle, broken.rules(), broken.text.replace('\n', " "), n + 1)
}

fn report(summary: &Summary) -> String {
    let coverage = &summary.coverage;
    let mut text = coverage.table() + "\n\n";
    let kinds =
        [("operations", &coverage.operations), ("crashes", &coverage.crashes), ("faults", &coverage.faults), ("others", &coverage.others)];
    for (title, counts) in kinds {
        let counts: Vec<String> = counts.iter().map(|(name, n)| format!("{name} {n}")).collect();
        let _ = writeln!(text, "{title}: {}", counts.join(", "));
    }
    let [operations, crashes, faults] = summary.medians();
    let _ = writeln!(text, "median of a seed: {operations} client operations, {crashes} crashes, {faults} other faults");
    text
}
