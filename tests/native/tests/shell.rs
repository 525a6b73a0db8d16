//! The shell on disks that fail as they are told: what the simulator does not see.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use lockstep_datapath::{Datapath, core::status::LegState};
use lockstep_native::{
    Rig, identical, seen,
    soak::{AllOf, Disks, Setup, Soak, Trouble},
    text,
};
use rustix::process::{Resource, Rlimit, setrlimit};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime")
}

fn seed() -> u64 {
    let seed = std::env::var("SOAK_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("SOAK_SEED={seed}");
    seed
}

#[test]
fn every_kind_of_trouble_below_the_shell_leaves_two_equal_copies_of_what_was_written_last() {
    runtime().block_on(async {
        let mut soak = Soak::new(seed(), Setup::default());
        for trouble in Trouble::ALL {
            soak.round(trouble, 3.0).await;
        }
    });
}

/// Mirror rule 27: what a late I/O has belongs to it, and nobody waits for it.
#[test]
fn a_disk_that_hangs_with_all_memory_in_its_hands_holds_up_nobody() {
    let slowest = runtime().block_on(Soak::new(seed(), Setup::default()).hung_with(AllOf::Memory));
    println!("the neighbour's slowest request took {slowest:?}");
}

/// The healthy disk's work must not wait for a worker that waits for the other disk: both would be late, and nobody would go OUT.
#[test]
fn a_disk_that_hangs_with_all_workers_in_its_hands_holds_up_nobody() {
    let setup = Setup { disks: Disks::Xfs, ..Setup::default() };
    let slowest = runtime().block_on(Soak::new(seed(), setup).hung_with(AllOf::Workers));
    println!("the neighbour's slowest request took {slowest:?}");
}

/// A ring that is smaller than what is in flight: nothing is lost, nothing hangs.
#[test]
fn a_small_ring_that_fills_up_loses_nothing() {
    runtime().block_on(async {
        let mut soak = Soak::new(seed(), Setup { ring_entries: 2, threads: 96, ..Setup::default() });
        let done = soak.round(Trouble::Host, 4.0).await;
        assert_eq!(Soak::ring_entries().iter().min(), Some(&2), "the ring is not small");
        // Two can be submitted at a time.
        assert!(done.disks["most in flight"] > 24, "the ring was never full: {:?}", done.disks);
    });
}

/// A write survives a few attempts without progress (mirror rule 6), so a moment must not last.
const MOMENT: Duration = Duration::from_micros(20);

/// Five seconds of fio on the first half MiB, while this process has a limit on the size of files for moments, until it is `enough`. Whether fio was content,
/// and the longest moment.
fn written_under_limits(device: &Path, limit: u64, enough: impl Fn() -> bool) -> (bool, Duration) {
    let filename = format!("--filename={}", text(device));
    let writes = ["--rw=randwrite", "--bs=128k", "--size=512k", "--iodepth=4", "--ioengine=libaio", "--direct=1"];
    // The same range is never in flight twice: what is to be found there would be anybody's guess.
    let verified = ["--verify=crc32c", "--verify_state_save=0", "--serialize_overlap=1"];
    let rest = ["--time_based=1", "--runtime=5", "--output-format=terse"];
    let arguments = [["--name=short", &filename].as_slice(), &writes, &verified, &rest].concat();
    // It must not inherit the limit.
    let mut load = Command::new("fio").args(arguments).stdout(Stdio::null()).spawn().unwrap();
    let set = |current| setrlimit(Resource::Fsize, Rlimit { current, maximum: None }).unwrap();
    let mut longest = Duration::ZERO;
    loop {
        for _ in 0..100 {
            if !enough() {
                set(Some(limit));
                let begun = Instant::now();
                while begun.elapsed() < MOMENT {
                    std::hint::spin_loop();
                }
                set(None);
                longest = longest.max(begun.elapsed());
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        if let Some(status) = load.try_wait().unwrap() {
            return (status.success(), longest);
        }
    }
}

/// A limit on the size of files, there for a moment only, cuts off what a write has beyond it. (Through FUSE no short write comes.) All writes begin
/// below the limit, and so do their remainders, of which it leaves an eighth of a block: no progress, until it is gone.
#[test]
fn a_write_that_the_kernel_cuts_short_is_finished() {
    const PIECE: u64 = 128 << 10;
    const LIMIT: u64 = 3 * PIECE + PIECE / 2 + 512;
    let rig = Rig::new(2, 600);
    let spec = rig.new_volume(7, 64);
    let legs = spec.legs.clone();
    seen::watch();
    let short = || seen::counts().get("short write").copied().unwrap_or_default();
    let before = short();
    runtime().block_on(async {
        let datapath = Datapath::start(1, None).unwrap();
        let volume = datapath.open(spec).await.unwrap();
        let device = volume.device().to_owned();
        let rounds = tokio::task::spawn_blocking(move || {
            for _ in 0..6 {
                let (content, longest) = written_under_limits(&device, LIMIT, || short() > before);
                // A machine that is busy with something else made a moment last.
                assert!(content || longest > 2 * MOMENT, "fio found an error");
                if content && short() > before {
                    return;
                }
            }
        });
        rounds.await.unwrap();
        assert!(volume.status().borrow().legs.iter().all(|leg| leg.state == LegState::In), "a leg went OUT");
        volume.close().await.unwrap();
    });
    assert!(identical(&legs[0], &legs[1]), "the copies differ");
    assert!(short() > before, "no write fell short: this proves nothing");
}
