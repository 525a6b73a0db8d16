//! `soak [MINUTES] [SEED]`: the shell on disks that fail as they are told, one volume after the other, each with a seed of its own: rounds of
//! every trouble in random order, rings and loads of several sizes, at times with XFS and a loop device in between. The first thing that is wrong
//! ends it with status 101, under the seed's line.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use lockstep_native::{
    faulty::Counts,
    soak::{AllOf, Disks, Setup, Soak, Trouble},
};

/// Of load in each round.
const SECONDS: f64 = 6.0;

fn add(to: &mut Counts, more: &Counts) {
    for (what, count) in more {
        *to.entry(what.clone()).or_default() += count;
    }
}

fn setup(random: &mut fastrand::Rng) -> Setup {
    let disks = if random.u8(0..4) == 0 { Disks::Xfs } else { Disks::Files };
    let ring_entries = *random.choice([2, 16, 1024].iter()).expect("three");
    Setup { ring_entries, threads: *random.choice([12, 24, 96].iter()).expect("three"), disks, ..Setup::default() }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let minutes: f64 = arguments.next().map_or(Ok(30.0), |minutes| minutes.parse())?;
    let mut seed: u64 = arguments.next().map_or_else(|| Ok(fastrand::u64(..)), |seed| seed.parse())?;
    let (begun, mut rounds, mut volumes) = (Instant::now(), 0u64, 0u64);
    let (mut load, mut disks, mut seen, mut slowest) = (Counts::new(), Counts::new(), Counts::new(), Duration::ZERO);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    while begun.elapsed().as_secs_f64() < minutes * 60.0 {
        let mut random = fastrand::Rng::with_seed(seed);
        let setup = setup(&mut random);
        println!("soak: seed {seed}, {setup:?}");
        let mut soak = Soak::new(seed, setup);
        let mut troubles: Vec<Trouble> = match setup.disks {
            Disks::Files => Trouble::ALL.to_vec(),
            // What ends in the loop driver is left out, and what XFS shuts down for: it would have to be mounted again.
            Disks::Xfs => vec![Trouble::Hang, Trouble::Late, Trouble::Hang],
        };
        random.shuffle(&mut troubles);
        let all = if setup.disks == Disks::Xfs { AllOf::Workers } else { AllOf::Memory };
        runtime.block_on(async {
            for trouble in troubles {
                let started = Instant::now();
                let done = soak.round(trouble, SECONDS).await;
                rounds += 1;
                add(&mut load, &done.load);
                seen = done.seen;
                slowest = slowest.max(done.out_after.unwrap_or_default());
                println!(
                    "soak: {:5.1} min, {trouble:9} {:4.1} s: {} operations, {} blocks written",
                    begun.elapsed().as_secs_f64() / 60.0,
                    started.elapsed().as_secs_f64(),
                    done.load["operations"],
                    done.load["blocks written"]
                );
            }
            soak.hung_with(all).await;
            rounds += 1;
        });
        soak.disk_counts().iter().for_each(|counts| add(&mut disks, counts));
        volumes += 1;
        seed = random.u64(..);
    }
    // Times and sizes are no sums.
    for what in ["most in flight", "held now"] {
        disks.remove(what);
    }
    println!("soak: load {load:?}\nsoak: the disks did {disks:?}\nsoak: the shell saw {} kinds of failure: {seen:?}", seen.len());
    println!(
        "figure: {rounds} rounds on {volumes} volumes, {} operations, a hung disk OUT after {slowest:.1?} at most",
        load["operations"]
    );
    println!("figure: the shell saw {} failures of {} kinds; no error above, all copies identical", seen.values().sum::<u64>(), seen.len());
    println!("{rounds} passed, 0 failed, 0 skipped");
    Ok(())
}
