//! Runs seeds of the simulator and reports what they reached.
//!
//! `sim [--oracles] [--first SEED] [SEEDS]`: with `--oracles`, without the core's own assertions, and it ends with the first seed that fails.
//! `sim --go-on [SEEDS]`: all of them, and a line for each that fails. `sim --seed SEED`: one seed, explained.

use std::{process::ExitCode, time::Instant};

use lockstep_sim::simulator::{Summary, Watch, explain, run_seed};

struct Arguments {
    watch: Watch,
    first: u64,
    seeds: u64,
    one: bool,
    go_on: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut parsed = Arguments { watch: Watch::Invariants, first: 0, seeds: 10_000, one: false, go_on: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let number = |word: Option<String>| word.and_then(|word| word.parse().ok()).ok_or("a number is missing");
        match word.as_str() {
            "--oracles" => parsed.watch = Watch::Oracles,
            "--go-on" => parsed.go_on = true,
            "--first" => parsed.first = number(words.next())?,
            "--seed" => (parsed.first, parsed.seeds, parsed.one) = (number(words.next())?, 1, true),
            _ => parsed.seeds = number(Some(word))?,
        }
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    let Arguments { watch, first, seeds, one, go_on } = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("sim: {error}");
            return ExitCode::FAILURE;
        }
    };
    let start = Instant::now();
    let mut failed = 0;
    let mut summary = Summary::default();
    for seed in first..first + seeds {
        let (coverage, broken) = run_seed(seed, watch);
        if let Some(broken) = broken {
            println!("seed {seed}: {}: {} (after {} seeds)", broken.oracle, broken.text, seed - first + 1);
            failed += 1;
            if go_on {
                continue;
            }
            if watch == Watch::Invariants {
                println!("{}", explain(seed, watch).unwrap_or_default());
            }
            return ExitCode::FAILURE;
        }
        summary.add(&coverage);
    }
    report(&summary, seeds, start.elapsed().as_secs_f64());
    let missing = summary.coverage.missing();
    if !one && !missing.is_empty() {
        println!("never reached: {}", missing.join(", "));
        return ExitCode::FAILURE;
    }
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn report(summary: &Summary, seeds: u64, seconds: f64) {
    let coverage = &summary.coverage;
    println!("{}\n", coverage.table());
    let kinds =
        [("operations", &coverage.operations), ("crashes", &coverage.crashes), ("faults", &coverage.faults), ("others", &coverage.others)];
    for (title, counts) in kinds {
        println!("{title}: {}", counts.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", "));
    }
    let [operations, crashes, faults] = summary.medians();
    println!("median of a seed: {operations} client operations, {crashes} crashes, {faults} other faults");
    println!("{seeds} seeds, {} events in {seconds:.1} s: {:.0} seeds/s", coverage.events, seeds as f64 / seconds);
}
