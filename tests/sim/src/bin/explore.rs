//! Every interleaving of a few writes, a flush, a fault and a crash on a tiny volume (`lockstep_sim::explore`).

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use lockstep_sim::explore::{Counts, Explorer, Family, Scenario};

const HELP: &str = "\
Usage: explore [--writes N] [--family NAME]... [--oracles] [--verbose]

  --writes N       writes in flight at once, 1 to 3 (2)
  --family NAME    only this family: writes, clears, reads, host, kinds, returns, unclean (all)
  --oracles        without the core's own assertions
  --verbose        a line for each scenario
";

struct Arguments {
    writes: usize,
    families: Vec<Family>,
    oracles: bool,
    verbose: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut parsed = Arguments { writes: 2, families: Vec::new(), oracles: false, verbose: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--writes" => {
                let number = words.next().and_then(|word| word.parse().ok()).filter(|writes| (1..=3).contains(writes));
                parsed.writes = number.ok_or("--writes takes a number from 1 to 3")?;
            }
            "--family" => {
                let name = words.next().unwrap_or_default();
                let family = Family::ALL.into_iter().find(|family| family.name() == name);
                parsed.families.push(family.ok_or_else(|| format!("no family {name:?}"))?);
            }
            "--oracles" => parsed.oracles = true,
            "--verbose" => parsed.verbose = true,
            "--help" => return Err(HELP.to_owned()),
            other => return Err(format!("explore: {other}: unknown\n{HELP}")),
        }
    }
    if parsed.families.is_empty() {
        parsed.families.extend(Family::ALL);
    }
    Ok(parsed)
}

/// The most memory that this process ever had, in MiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// Seconds that this process had a processor.
fn processor() -> f64 {
    let schedstat = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    schedstat.split(' ').next().and_then(|nanos| nanos.parse::<u64>().ok()).unwrap_or(0) as f64 / 1e9
}

fn row(name: &str, scenarios: u64, counts: &Counts, seconds: f64) {
    println!(
        "{name:<8} {scenarios:>9} {:>10} {:>11} {:>9} {:>11} {:>6} {seconds:>7.1} s",
        counts.states,
        counts.transitions + scenarios - counts.states,
        counts.crashes,
        counts.images,
        counts.depth
    );
}

/// How far it came, now and then.
struct Progress {
    start: Instant,
    told: Instant,
    scenarios: usize,
}

impl Progress {
    const EVERY: Duration = Duration::from_secs(30);

    fn tell(&mut self, scenario: u64, states: u64, name: &str) {
        if self.told.elapsed() >= Self::EVERY {
            self.told = Instant::now();
            let (seconds, scenarios) = (self.start.elapsed().as_secs(), self.scenarios);
            eprintln!("{seconds} s: {states} states, {} MiB, scenario {scenario} of {scenarios}: {name}", peak());
        }
    }
}

fn main() -> ExitCode {
    let Arguments { writes, families, oracles, verbose } = match arguments() {
        Ok(arguments) => arguments,
        Err(text) => {
            eprint!("{text}");
            return ExitCode::FAILURE;
        }
    };
    // The core's panics are told with the way that leads to them.
    std::panic::set_hook(Box::new(|_| ()));
    let mut explorer = Explorer::new(oracles);
    let scenarios: Vec<(Family, Vec<Scenario>)> = families.into_iter().map(|family| (family, family.scenarios(writes))).collect();
    let start = Instant::now();
    let mut progress = Progress { start, told: start, scenarios: scenarios.iter().map(|(_, scenarios)| scenarios.len()).sum() };
    let (mut passed, mut total) = (0, Counts::default());
    println!("up to {writes} writes; images are what crashes leave, recovered once each");
    println!("family   scenarios     states known again   crashes      images events      time");
    for (family, scenarios) in &scenarios {
        let (begun, mut sum) = (Instant::now(), Counts::default());
        for scenario in scenarios {
            let (begun, mut counts) = (Instant::now(), Counts::default());
            let explored = explorer.explore(scenario, &mut counts, |counts| {
                progress.tell(passed + 1, total.states + sum.states + counts.states, &scenario.name());
            });
            if let Err(failure) = explored {
                println!("{}", explorer.tell(scenario, &failure));
                println!("{passed} passed, 1 failed, 0 skipped");
                return ExitCode::FAILURE;
            }
            if verbose {
                row(&scenario.name(), 1, &counts, begun.elapsed().as_secs_f64());
            }
            passed += 1;
            sum.add(&counts);
        }
        row(family.name(), scenarios.len() as u64, &sum, begun.elapsed().as_secs_f64());
        total.add(&sum);
    }
    row("all", passed, &total, start.elapsed().as_secs_f64());
    let (states, again, images) = (total.states, total.transitions + passed - total.states, explorer.images());
    let (seconds, processor, mib) = (start.elapsed().as_secs_f64(), processor(), peak());
    println!("{states} different states, reached again {again} times; {} crashes left {images} different images", total.crashes);
    println!("{seconds:.0} s, {processor:.0} s of a processor, at most {mib} MiB");
    println!("{passed} passed, 0 failed, 0 skipped");
    ExitCode::SUCCESS
}
