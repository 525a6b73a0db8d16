//! The datapath on real disks: what the kernel does to us, and what a program that knows nothing of us finds on the legs.

use std::{
    fs,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::Duration,
};

use lockstep_datapath::{
    Datapath, Error, LegPath, Volume,
    core::{
        io::Fill,
        status::{LegState, Status, Sync},
        units::{Errno, Slot},
    },
};
use lockstep_native::{
    Rig, Server, fio, identical, leg_id, run,
    scribble::{changed_pieces, write_while_changing},
    succeeds,
};

const MIB: u64 = 256;

fn runtime() -> tokio::runtime::Runtime {
    drop(tracing_subscriber::fmt().with_env_filter("info").with_test_writer().try_init());
    tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime")
}

fn healthy(status: &Status) -> bool {
    status.ready && status.sync == Sync::Idle && status.legs.iter().all(|leg| leg.state == LegState::In)
}

/// The limit only catches a hang.
async fn wait(volume: &Volume, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
    let mut status = volume.status();
    let found = tokio::time::timeout(Duration::from_secs(120), status.wait_for(|status| wanted(status))).await;
    *found.unwrap_or_else(|_| panic!("never {what}: {:?}", *volume.status().borrow())).expect("the volume is open")
}

/// How many writes the block device has done since the machine started.
fn writes(device: &Path) -> u64 {
    let stat = fs::read_to_string(Path::new("/sys/block").join(device.file_name().expect("a device")).join("stat"));
    stat.expect("the device is there").split_whitespace().nth(4).expect("write I/Os").parse().expect("a number")
}

fn mounted(device: &Path, at: &Path, work: impl FnOnce(&Path)) {
    fs::create_dir_all(at).expect("a mount point");
    run("mount", &[device.to_str().unwrap(), at.to_str().unwrap()]);
    work(at);
    run("umount", &[at.to_str().unwrap()]);
}

/// Each copy alone is an ordinary image that holds the files.
fn each_copy_holds(rig: &Rig, legs: &[&LegPath], name: &str, content: &str) {
    for leg in legs {
        let at = rig.dir().join("copy");
        fs::create_dir_all(&at).expect("a mount point");
        run("mount", &["-o", "loop,ro", leg.dir.join("data").to_str().unwrap(), at.to_str().unwrap()]);
        let found = fs::read_to_string(at.join(name));
        run("umount", &[at.to_str().unwrap()]);
        assert_eq!(found.expect("the file"), content, "{}", leg.dir.display());
    }
}

#[test]
fn overlapping_writers_leave_two_identical_copies_that_a_foreign_program_can_mount() {
    let rig = Rig::new(2, 600);
    let spec = rig.new_volume(1, MIB);
    let legs = spec.legs.clone();
    runtime().block_on(async {
        let datapath = Datapath::start(1, None).unwrap();
        let volume = datapath.open(spec.clone()).await.unwrap();
        wait(&volume, "healthy", healthy).await;
        let device = volume.device().to_owned();
        assert!(fio(&device, 8).wait().unwrap().success(), "fio found an error");
        run("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", device.to_str().unwrap()]);
        mounted(&device, &rig.dir().join("fs"), |at| {
            fs::write(at.join("hello"), "kept twice").unwrap();
            run("cp", &["-r", "/usr/include/linux", at.to_str().unwrap()]);
            run("sync", &["-f", at.to_str().unwrap()]);
            run("fstrim", &[at.to_str().unwrap()]);
        });
        volume.close().await.unwrap();
        assert!(identical(&legs[0], &legs[1]), "the copies differ");
        each_copy_holds(&rig, &[&legs[0], &legs[1]], "hello", "kept twice");

        // A clean stop leaves nothing to resync.
        let volume = datapath.open(spec).await.unwrap();
        let status = wait(&volume, "healthy", healthy).await;
        assert_eq!((status.dirty_regions, status.copied_blocks), (0, 0));
        volume.close().await.unwrap();
    });
    // The comparison can fail: one byte flipped is found.
    let mut data = fs::OpenOptions::new().write(true).open(legs[0].dir.join("data")).unwrap();
    data.seek(SeekFrom::Start((MIB << 20) - 1)).unwrap();
    let last = fs::read(legs[1].dir.join("data")).unwrap().pop().unwrap();
    data.write_all(&[!last]).unwrap();
    data.sync_all().unwrap();
    assert!(!identical(&legs[0], &legs[1]), "a flipped byte was not found");
}

#[test]
fn a_disk_that_fails_under_load_is_not_noticed_above_and_a_third_disk_is_filled() {
    let rig = Rig::new(3, 600);
    let spec = rig.new_volume(2, MIB);
    let legs = spec.legs.clone();
    runtime().block_on(async {
        let datapath = Datapath::start(1, None).unwrap();
        let volume = datapath.open(spec.clone()).await.unwrap();
        wait(&volume, "healthy", healthy).await;
        // A leg that counts is not replaced by a mistake.
        let early = rig.spare(2, spec.volume, leg_id(2, 9), MIB);
        let refused = volume.attach(Slot::B, early.clone(), Fill::Everything).await;
        assert!(matches!(refused, Err(Error::Mirror(Errno::EBUSY))), "{refused:?}");
        fs::remove_dir_all(early.dir).unwrap();
        let mut load = fio(volume.device(), 12);
        tokio::time::sleep(Duration::from_secs(3)).await;
        rig.fail_disk(1);
        let status = wait(&volume, "degraded", |status| status.legs[1].state == LegState::Out).await;
        assert_eq!(status.legs[0].state, LegState::In);
        let new = leg_id(2, 3);
        let spare = rig.spare(2, spec.volume, new, MIB);
        volume.attach(Slot::B, spare.clone(), Fill::Everything).await.unwrap();
        let status = wait(&volume, "rebuilt", healthy).await;
        assert_eq!(status.legs[1].id, new);
        assert!(load.wait().unwrap().success(), "fio found an error");
        volume.close().await.unwrap();
        assert!(identical(&legs[0], &spare), "the copies differ");
        assert!(!identical(&legs[1], &spare), "the failed leg cannot be equal");
    });
}

/// Mirror rule 25: what the dead process had in the kernel is over before the next one touches a leg; rules 17 and 21 do the rest.
#[test]
fn killed_under_load_again_and_again_the_copies_are_equal_after_the_next_assembly() {
    let rig = Rig::new(2, 600);
    let spec = rig.new_volume(6, MIB);
    for round in 1..=5 {
        let server = Server::start(env!("CARGO_BIN_EXE_serve"), None, std::slice::from_ref(&spec));
        let before = writes(&server.devices[0]);
        let mut load = fio(&server.devices[0], 20);
        while writes(&server.devices[0]) < before + 500 {
            assert!(load.try_wait().expect("fio was started").is_none(), "fio ended early");
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(300 * round));
        server.kill();
        // The device is dead: whatever the load gets now is an error, and it ends.
        load.wait().expect("fio was started");
        runtime().block_on(async {
            let datapath = Datapath::start(1, None).unwrap();
            let volume = datapath.open(spec.clone()).await.unwrap();
            let status = wait(&volume, "healthy", healthy).await;
            assert!(status.copied_blocks > 0, "nothing was dirty: {status:?}");
            volume.close().await.unwrap();
        });
        assert!(identical(&spec.legs[0], &spec.legs[1]), "the copies differ after kill {round}");
    }
}

#[test]
fn a_volume_that_was_not_closed_resyncs_its_dirty_regions_only_and_keeps_its_files() {
    const MIB: u64 = 320;
    let rig = Rig::new(2, 600);
    let spec = rig.new_volume(3, MIB);
    let legs = spec.legs.clone();
    runtime().block_on(async {
        let datapath = Datapath::start(2, None).unwrap();
        let volume = datapath.open(spec.clone()).await.unwrap();
        let device = volume.device().to_owned();
        run("mkfs.xfs", &["-q", "-K", device.to_str().unwrap()]);
        mounted(&device, &rig.dir().join("fs"), |at| {
            fs::write(at.join("hello"), "still there").unwrap();
        });
        drop(volume);
        let volume = datapath.open(spec.clone()).await.unwrap();
        let status = wait(&volume, "healthy", healthy).await;
        assert!(status.copied_blocks > 0, "{status:?}");
        assert!(status.copied_blocks < (MIB << 20) / 4096 / 2, "{status:?}");
        mounted(volume.device(), &rig.dir().join("fs"), |at| {
            assert_eq!(fs::read_to_string(at.join("hello")).unwrap(), "still there");
        });
        volume.close().await.unwrap();
        assert!(identical(&legs[0], &legs[1]), "the copies differ");
    });
}

#[test]
fn a_leg_that_was_away_gets_only_what_it_missed() {
    let rig = Rig::new(2, 600);
    let spec = rig.new_volume(4, MIB);
    let legs = spec.legs.clone();
    runtime().block_on(async {
        let datapath = Datapath::start(1, None).unwrap();
        let volume = datapath.open(spec.clone()).await.unwrap();
        let device = volume.device().to_str().unwrap().to_owned();
        run("fio", &["--name=fill", &format!("--filename={device}"), "--rw=write", "--bs=1M", "--direct=1", "--output=/dev/null"]);
        volume.detach(Slot::B).await.unwrap();
        wait(&volume, "degraded", |status| status.legs[1].state == LegState::Out).await;
        let missed = ["--rw=randwrite", "--bs=4k", "--size=8M", "--offset=64M", "--direct=1", "--output=/dev/null"];
        run("fio", &[["--name=missed", &format!("--filename={device}")].as_slice(), &missed].concat());
        volume.attach(Slot::B, legs[1].clone(), Fill::DirtyRegions).await.unwrap();
        let status = wait(&volume, "rebuilt", healthy).await;
        // Two regions of 16 MiB at most, of 256 MiB, if the fill's bits were cleaned; never more than was dirty.
        assert!(status.copied_blocks > 0, "{status:?}");
        volume.close().await.unwrap();
        assert!(identical(&legs[0], &legs[1]), "the copies differ");
    });
}

#[test]
fn a_volume_grows_while_it_is_mounted() {
    const MIB: u64 = 320;
    let rig = Rig::new(2, 900);
    let spec = rig.new_volume(5, MIB);
    let legs = spec.legs.clone();
    runtime().block_on(async {
        let datapath = Datapath::start(1, None).unwrap();
        let volume = datapath.open(spec.clone()).await.unwrap();
        let device = volume.device().to_str().unwrap().to_owned();
        run("mkfs.xfs", &["-q", "-K", &device]);
        let at = rig.dir().join("fs");
        fs::create_dir_all(&at).unwrap();
        run("mount", &[&device, at.to_str().unwrap()]);
        volume.grow((2 * MIB) << 20).await.unwrap();
        assert_eq!(run("blockdev", &["--getsize64", &device]).trim(), ((2 * MIB) << 20).to_string());
        // XFS, because growing a mounted ext4 takes CAP_SYS_RESOURCE, which not every machine that runs this has.
        run("xfs_growfs", &[at.to_str().unwrap()]);
        let file = at.join("big");
        run("dd", &["if=/dev/urandom", &format!("of={}", file.display()), "bs=1M", "count=400", "conv=fsync", "status=none"]);
        run("umount", &[at.to_str().unwrap()]);
        assert!(succeeds("xfs_repair", &["-n", &device]), "the file system is damaged");
        volume.close().await.unwrap();
        assert!(identical(&legs[0], &legs[1]), "the copies differ");
    });
}

#[test]
fn case_08_a_program_that_changes_its_buffer_in_flight_leaves_two_equal_copies() {
    const PIECES: u64 = 1000;
    let rig = Rig::new(2, 600);
    let spec = rig.new_volume(1, MIB);
    let legs = spec.legs.clone();
    runtime().block_on(async {
        let datapath = Datapath::start(1, None).unwrap();
        let volume = datapath.open(spec).await.unwrap();
        wait(&volume, "healthy", healthy).await;
        let device = volume.device().to_owned();
        tokio::task::spawn_blocking(move || write_while_changing(&device, PIECES)).await.unwrap().unwrap();
        volume.close().await.unwrap();
    });
    assert!(identical(&legs[0], &legs[1]), "the copies differ");
    let changed = changed_pieces(&legs[0].dir.join("data"), PIECES as usize).unwrap();
    assert!(changed > 0, "no write was caught in flight: the test proved nothing");
}

/// Somebody probes the free loop device that the kernel offers, or is about to attach it, and is slow.
#[test]
fn a_free_loop_device_that_somebody_has_for_a_moment_is_waited_for() {
    let rig = Rig::new(2, 600);
    let spec = rig.new_volume(21, 64);
    let free = run("losetup", &["--find"]);
    let held = fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(free.trim()).unwrap();
    let holder = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(700));
        drop(held);
    });
    runtime().block_on(async {
        let datapath = Datapath::start(1, None).unwrap();
        datapath.open(spec).await.unwrap().close().await.unwrap();
    });
    holder.join().unwrap();
}

/// The flags of a process's datapath thread, as the kernel has them (`PF_*`).
fn flags_of_datapath_thread(process: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    let mut stats = tasks.filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
    let stat = stats.find(|stat| stat.contains("(datapath-0) ")).expect("it runs");
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    rest.split(' ').nth(6).unwrap().parse().unwrap()
}

/// Writing pages out to free memory must not wait for the thread that is to write them. Where we may not say so, we say that.
#[test]
fn a_datapath_thread_is_an_io_flusher_or_the_log_says_that_it_is_not() {
    const MEMALLOC_NOIO_AND_LOCAL_THROTTLE: u64 = 0x0018_0000;
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let capabilities = own.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    let permitted = u64::from_str_radix(capabilities.trim(), 16).unwrap() & CAP_SYS_RESOURCE != 0;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_serve"));
    let serve = command.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let flags = flags_of_datapath_thread(serve.id());
    let said = String::from_utf8(serve.wait_with_output().unwrap().stderr).unwrap();
    assert_eq!(flags & MEMALLOC_NOIO_AND_LOCAL_THROTTLE == MEMALLOC_NOIO_AND_LOCAL_THROTTLE, permitted, "{flags:#x}");
    assert_eq!(said.matches("PR_SET_IO_FLUSHER is not permitted").count(), usize::from(!permitted), "{said}");
}
