//! Calls that are cut off: by a caller who goes away, by the kill of a program that csi-node has at work. The same call again does it to its end.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    client::{Client, Place},
    driver::{Driver, until},
    lab::{Lab, mounts_at, text},
};
use lockstep_native::run;
use tonic::{Code, Status};

const MIB: u64 = 1 << 20;
/// In so many parts of its usual time a call is cut off.
const MOMENTS: u32 = 8;

/// A call of the kubelet's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Call {
    Stage,
    Publish,
    /// To so many bytes, which the controller made room for.
    Expand(u64),
    Unpublish,
    Unstage,
}

impl Call {
    async fn make(self, client: &Client, place: &Place) -> Result<(), Status> {
        match self {
            Self::Stage => client.stage(&place.id, &place.staging, place.fs_type).await,
            Self::Publish => client.publish(&place.id, &place.staging, &place.target, place.fs_type).await,
            Self::Expand(bytes) => client.node_expand(&place.id, &place.target, bytes).await.map(drop),
            Self::Unpublish => client.unpublish(&place.id, &place.target).await,
            Self::Unstage => client.unstage(&place.id, &place.staging).await,
        }
    }

    /// Cuts it off after this time, and then makes it again until it is answered. `false`: it had ended before.
    async fn cut_off(self, client: &Client, place: &Place, after: Duration) -> bool {
        // Whoever is gone has dropped the call: its stream is reset.
        let first = tokio::time::timeout(after, self.make(client, place)).await;
        if let Ok(answer) = &first {
            answer.as_ref().unwrap_or_else(|error| panic!("{self:?}: {error}"));
        }
        until(&format!("{self:?} is answered"), || async {
            match self.make(client, place).await {
                Ok(()) => Some(()),
                // Nobody else may say so: what was cut off is still at work.
                Err(busy) if busy.code() == Code::Aborted => None,
                Err(error) => panic!("{self:?}, cut off after {after:?}, again: {error}"),
            }
        })
        .await;
        first.is_err()
    }
}

/// By 80 MiB at least.
async fn has_grown(driver: &Driver, place: &Place, bytes: u64) {
    let total = driver.client.usage(&place.id, &place.target).await.unwrap()[0].total;
    // XFS has a log of 64 MiB, which it does not count.
    assert!(total.cast_unsigned() > bytes - 80 * MIB, "{bytes} bytes, of which {total} can be used");
}

/// What the call asked for is so, and once.
async fn done(call: Call, lab: &Lab, driver: &Driver, place: &Place) {
    let staged = || fs::read_dir(lab.path("driver/state/staged")).unwrap().count();
    let wanted = match call {
        Call::Stage => (usize::from(place.fs_type.is_some()), 0, 1),
        Call::Publish | Call::Expand(_) => (usize::from(place.fs_type.is_some()), 1, 1),
        Call::Unpublish => (usize::from(place.fs_type.is_some()), 0, 1),
        Call::Unstage => (0, 0, 0),
    };
    assert_eq!((mounts_at(&place.staging), mounts_at(&place.target), staged()), wanted, "{call:?}: mounts and records");
    match call {
        Call::Publish if place.fs_type.is_some() => fs::write(place.target.join("f"), &place.id).unwrap(),
        Call::Expand(bytes) => has_grown(driver, place, bytes).await,
        Call::Unpublish => assert!(!place.target.exists()),
        Call::Unstage => {
            assert_eq!(driver.volume(&place.id).await.status.unwrap().device, None);
            assert_eq!(fs::read_dir(lab.path("driver/state/run")).unwrap().count(), 0, "its device is left");
        }
        Call::Publish | Call::Stage => {}
    }
}

/// The life of a volume, of which each call is cut off at a part of the time that it took in the first one, in which none is.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_was_cut_off_anywhere_is_done_by_the_same_call_again() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let mut cut: BTreeMap<Call, u32> = BTreeMap::new();
    // No growth of a mounted ext4: growth.rs.
    for (fs_type, grown) in [(Some("xfs"), Some(480 * MIB)), (Some("ext4"), None), (None, Some(480 * MIB))] {
        let mut usual: BTreeMap<Call, Duration> = BTreeMap::new();
        for moment in 0..MOMENTS {
            let place = driver.place(&format!("{}-{moment}", fs_type.unwrap_or("raw")), 320 * MIB, fs_type).await;
            let calls = [Some(Call::Stage), Some(Call::Publish), grown.map(Call::Expand), Some(Call::Unpublish), Some(Call::Unstage)];
            for call in calls.into_iter().flatten() {
                if let Call::Expand(bytes) = call {
                    client.controller_expand(&place.id, bytes).await.unwrap();
                }
                if let Some(usual) = usual.get(&call) {
                    let times = cut.entry(call).or_default();
                    *times += u32::from(call.cut_off(&client, &place, *usual * moment / MOMENTS).await);
                } else {
                    let begun = Instant::now();
                    call.make(&client, &place).await.unwrap();
                    usual.insert(call, begun.elapsed());
                }
                done(call, &lab, &driver, &place).await;
            }
            driver.assert_copies_identical(&place.id).await;
            if fs_type.is_some() {
                client.stage(&place.id, &place.staging, fs_type).await.unwrap();
                assert_eq!(fs::read_to_string(place.staging.join("f")).unwrap(), place.id);
                client.unstage(&place.id, &place.staging).await.unwrap();
            }
            client.delete(&place.id).await.unwrap();
        }
    }
    println!("figure: calls that were cut off: {cut:?}");
    assert!(cut.values().all(|times| *times > 1), "not every call was cut off: {cut:?}");
    driver.stop();
}

/// A program that csi-node runs: while a file beside it says when, it is killed so many seconds after it began, or before, and whoever waits for it sees that.
struct Killed<'a> {
    lab: &'a Lab,
    name: &'static str,
}

impl<'a> Killed<'a> {
    fn new(lab: &'a Lab, name: &'static str) -> Self {
        fs::create_dir_all(lab.path("programs")).unwrap();
        let killed = Self { lab, name };
        let (after, ends, program) = (killed.at("after"), killed.at("ends"), lab.path("programs").join(name));
        let script = format!(
            "#!/bin/sh\nPATH=${{PATH#*:}}\nafter=$(cat {after} 2>/dev/null) || exec {name} \"$@\"\nrm {after}\n\
             [ $after = first ] && kill -KILL $$\n{name} \"$@\" & sleep $after; kill -KILL $!; wait $!; echo $? >>{ends}; kill -KILL $$\n"
        );
        fs::write(&program, script).unwrap();
        run("chmod", &["+x", text(&program)]);
        killed
    }

    fn at(&self, what: &str) -> String {
        text(&self.lab.path("programs").join(format!("{}.{what}", self.name))).to_owned()
    }

    /// The next time it runs.
    fn after(&self, millis: u64) {
        fs::write(self.at("after"), format!("0.{millis:03}")).unwrap();
    }

    /// The next time, before it has done anything.
    fn first(&self) {
        fs::write(self.at("after"), "first").unwrap();
    }

    /// How often it was killed before its end.
    fn times(&self) -> usize {
        assert!(!Path::new(&self.at("after")).exists(), "{} did not run", self.name);
        fs::read_to_string(self.at("ends")).unwrap_or_default().lines().filter(|end| *end == "137").count()
    }
}

/// At once and later.
#[tokio::test(flavor = "multi_thread")]
async fn an_expansion_whose_xfs_growfs_was_killed_is_done_by_the_same_call_again() {
    let lab = Lab::new(2, 1500);
    let xfs_growfs = Killed::new(&lab, "xfs_growfs");
    let mut driver = Driver::start(&lab).await;
    driver.kill_node();
    driver.use_programs(Some(&lab.path("programs")));
    driver.start_node().await;
    let client = driver.client.clone();
    let size = async |place: &Place| client.usage(&place.id, &place.target).await.unwrap()[0].total;

    let xfs = driver.place("xfs", 320 * MIB, Some("xfs")).await;
    xfs.up(&client).await.unwrap();
    fs::write(xfs.target.join("f"), "kept").unwrap();
    for (round, millis) in [0, 1, 2, 3, 5, 8].into_iter().enumerate() {
        let (before, bytes) = (size(&xfs).await, (6 + round as u64) * 64 * MIB);
        client.controller_expand(&xfs.id, bytes).await.unwrap();
        xfs_growfs.after(millis);
        let failed = client.node_expand(&xfs.id, &xfs.target, bytes).await.unwrap_err();
        assert!(failed.message().contains("xfs_growfs"), "{failed}");
        assert_eq!(client.node_expand(&xfs.id, &xfs.target, bytes).await.unwrap(), bytes.cast_signed());
        assert!(size(&xfs).await > before + (50 << 20), "killed after {millis} ms");
        assert_eq!(fs::read_to_string(xfs.target.join("f")).unwrap(), "kept");
    }
    // A stage that is repeated does it too.
    client.controller_expand(&xfs.id, 768 * MIB).await.unwrap();
    xfs_growfs.first();
    let before = size(&xfs).await;
    client.node_expand(&xfs.id, &xfs.target, 768 * MIB).await.unwrap_err();
    assert_eq!(size(&xfs).await, before);
    client.stage(&xfs.id, &xfs.staging, Some("xfs")).await.unwrap();
    has_grown(&driver, &xfs, 768 * MIB).await;
    // It grows when it is staged, too. Nothing is half-staged after an error: no call to unstage would follow.
    xfs.down(&client).await.unwrap();
    client.controller_expand(&xfs.id, 800 * MIB).await.unwrap();
    xfs_growfs.first();
    let failed = client.stage(&xfs.id, &xfs.staging, Some("xfs")).await.unwrap_err();
    assert!(failed.message().contains("xfs_growfs"), "{failed}");
    done(Call::Unstage, &lab, &driver, &xfs).await;
    xfs.up(&client).await.unwrap();
    has_grown(&driver, &xfs, 800 * MIB).await;
    assert_eq!(fs::read_to_string(xfs.target.join("f")).unwrap(), "kept");
    xfs.down(&client).await.unwrap();
    driver.assert_copies_identical(&xfs.id).await;
    run("xfs_repair", &["-n", "-f", text(&driver.copies(&xfs.id).await[0])]);
    println!("figure: xfs_growfs was killed before its end {} times", xfs_growfs.times());
    assert!(xfs_growfs.times() > 0, "it was never killed before its end");
    driver.stop();
}

/// An ext4 that grows when it is staged: what resize2fs left behind is repaired without a person, and nothing of it is lost.
#[tokio::test(flavor = "multi_thread")]
async fn an_ext4_whose_resize2fs_was_killed_is_staged_by_the_same_call_again() {
    let lab = Lab::new(2, 2400);
    let resize2fs = Killed::new(&lab, "resize2fs");
    let mut driver = Driver::start(&lab).await;
    driver.kill_node();
    driver.use_programs(Some(&lab.path("programs")));
    driver.start_node().await;
    let client = driver.client.clone();
    let place = driver.place("ext4", 64 * MIB, Some("ext4")).await;
    client.stage(&place.id, &place.staging, Some("ext4")).await.unwrap();
    let content: Vec<u8> = (0..8 * MIB).map(|at| (at / 4096 % 251) as u8).collect();
    fs::write(place.staging.join("f"), &content).unwrap();
    for round in 0..12u64 {
        client.unstage(&place.id, &place.staging).await.unwrap();
        let bytes = (2 + round) * 128 * MIB;
        client.controller_expand(&place.id, bytes).await.unwrap();
        resize2fs.after(1 + round);
        let failed = client.stage(&place.id, &place.staging, Some("ext4")).await.unwrap_err();
        assert!(failed.message().contains("resize2fs"), "{failed}");
        client.stage(&place.id, &place.staging, Some("ext4")).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert!(fs::read(place.staging.join("f")).unwrap() == content, "round {round}");
        let total = client.usage(&place.id, &place.staging).await.unwrap()[0].total;
        assert!(total.cast_unsigned() > bytes / 10 * 9, "{total} of {bytes}");
    }
    client.unstage(&place.id, &place.staging).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    run("e2fsck", &["-f", "-n", text(&driver.copies(&place.id).await[0])]);
    println!("figure: resize2fs was killed before its end {} times", resize2fs.times());
    assert!(resize2fs.times() > 0, "it was never killed before its end");
    driver.stop();
}

/// csi-node itself is killed while it expands; its successor serves the volume on, and is asked again.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_expand_whose_csi_node_was_killed_is_done_by_the_next_one() {
    let lab = Lab::new(2, 2400);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let (place, block) = (driver.place("xfs", 320 * MIB, Some("xfs")).await, driver.place("raw", 320 * MIB, None).await);
    for place in [&place, &block] {
        place.up(&driver.client).await.unwrap();
    }
    fs::write(place.target.join("f"), "kept").unwrap();
    for round in 0..8u64 {
        for place in [&place, &block] {
            let bytes = (400 + round * 80) * MIB;
            driver.client.controller_expand(&place.id, bytes).await.unwrap();
            let (client, moved) = (driver.client.clone(), place.clone());
            let expand = tokio::spawn(async move { client.node_expand(&moved.id, &moved.target, bytes).await });
            tokio::time::sleep(Duration::from_millis(round * 4)).await;
            driver.kill_node();
            drop(expand.await);
            driver.start_node().await;
            let again = driver.client.node_expand(&place.id, &place.target, bytes).await;
            assert_eq!(again.unwrap_or_else(|error| panic!("round {round}: {error}")), bytes.cast_signed());
            has_grown(&driver, place, bytes).await;
        }
    }
    assert_eq!(fs::read_to_string(place.target.join("f")).unwrap(), "kept");
    for place in [&place, &block] {
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
    }
    driver.stop();
}
