//! `make e2e`: installs the chart on the cluster of `tests/e2e/up` with helm, and does what its users do and what happens to them. One line for each
//! step; a step that fails does not end the run, unless nothing can work without it.

mod cluster;
mod load;
mod steps;

use std::{process::ExitCode, time::Instant};

use steps::{Step, all};

/// Words of the steps that are to run; none: all of them.
fn some() -> Vec<String> {
    std::env::args().skip(1).collect()
}

fn main() -> ExitCode {
    let only = some();
    let (began, mut passed, mut failed, mut skipped) = (Instant::now(), 0, 0, 0);
    let mut usable = true;
    for Step { name, needed, run } in all() {
        if !usable || !(only.is_empty() || needed || only.iter().any(|word| name.contains(word.as_str()))) {
            skipped += 1;
            continue;
        }
        let start = Instant::now();
        let result = run();
        let seconds = start.elapsed().as_secs_f32();
        match result {
            Ok(what) => {
                passed += 1;
                println!("ok     {seconds:>5.1} s  {name}{}{what}", if what.is_empty() { "" } else { ": " });
            }
            Err(error) => {
                failed += 1;
                usable &= !needed;
                println!("FAILED {seconds:>5.1} s  {name}: {error:#}");
            }
        }
    }
    println!("{} s", began.elapsed().as_secs());
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
