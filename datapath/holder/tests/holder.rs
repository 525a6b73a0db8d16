//! The holder over its socket.
#![allow(missing_docs)]

use std::{
    fs::{File, OpenOptions},
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use lockstep_fuse_holder::{Error, Holder, Server, VERSION, bind};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, connect, recv, send, socket_with};

const PATIENCE: Duration = Duration::from_secs(10);
const LATER: u8 = VERSION + 1;

fn fuse() -> OwnedFd {
    OpenOptions::new().read(true).write(true).open("/dev/fuse").expect("/dev/fuse").into()
}

fn serve(path: &Path) {
    let listener = bind(path).expect("a socket");
    thread::spawn(move || Server::new(listener).run());
}

fn start(path: &Path) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_fuse-holder"));
    child.arg("--socket").arg(path).stderr(Stdio::null()).spawn().expect("the holder")
}

fn end(mut child: Child) {
    child.kill().and_then(|()| child.wait()).expect("it was started");
}

#[test]
fn what_is_put_is_there_until_it_is_removed_and_nothing_but_fuse_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/holder.sock");
    serve(&path);
    let holder = Holder::connect(&path, "test", PATIENCE).unwrap();
    assert!(holder.get("a").unwrap().is_none());
    holder.put("a", fuse()).unwrap();
    holder.put("b", fuse()).unwrap();
    assert!(matches!(holder.put("c", File::open("/dev/null").unwrap().into()), Err(Error::Refused { .. })));
    assert_eq!(holder.list().unwrap(), ["a", "b"]);
    assert!(holder.get("a").unwrap().is_some());
    holder.remove("a").unwrap();
    holder.remove("a").unwrap();
    assert!(holder.get("a").unwrap().is_none());
    assert_eq!(bind(&path).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn a_new_holder_is_given_what_the_old_one_had() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("holder.sock");
    let first = start(&path);
    let holder = Holder::connect(&path, "test", PATIENCE).unwrap();
    holder.put("a", fuse()).unwrap();
    end(first);
    let second = start(&path);
    let deadline = Instant::now() + PATIENCE;
    while holder.list().ok().is_none_or(|names| names != ["a"]) {
        assert!(Instant::now() < deadline, "the new holder was not given it");
        thread::sleep(Duration::from_millis(20));
    }
    end(second);
}

#[test]
fn another_version_is_told_this_one_and_nothing_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("holder.sock");
    serve(&path);
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    send(&socket, &[VERSION + 1, 1, b'x'], SendFlags::empty()).unwrap();
    let mut answer = [0; 16];
    let (len, _) = recv(&socket, &mut answer, RecvFlags::empty()).unwrap();
    assert_eq!(&answer[..len], &[VERSION, 2]);
    assert_eq!(recv(&socket, &mut answer, RecvFlags::empty()).unwrap().0, 0, "it is turned away");
}

/// A holder that gives one client these answers, one after the other, and the last one to whatever else it asks.
fn answer_with(path: &Path, answers: &'static [&'static [u8]]) {
    let listener = bind(path).expect("a socket");
    thread::spawn(move || {
        while let Ok(client) = accept(&listener) {
            let mut answers = answers.iter();
            let mut answer = answers.next();
            while let Some(bytes) = answer
                && recv(&client, &mut [0; 256], RecvFlags::empty()).is_ok_and(|(len, _)| len > 0)
            {
                send(&client, bytes, SendFlags::NOSIGNAL).expect("the client is there");
                answer = answers.next().or(answer);
            }
        }
    });
}

/// What the other bytes of its answers mean, nobody knows who does not know its version.
#[test]
fn a_holder_of_another_version_is_refused_at_once_whatever_else_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let others: [&'static [&'static [u8]]; 5] = [&[&[LATER, 0]], &[&[LATER, 2]], &[&[LATER, 4]], &[&[LATER, 99]], &[&[LATER, 0, 0xff]]];
    for (number, answers) in others.into_iter().enumerate() {
        let path = dir.path().join(number.to_string());
        answer_with(&path, answers);
        let start = Instant::now();
        let refused = Holder::connect(&path, "test", PATIENCE).expect_err("it was accepted");
        assert!(matches!(refused, Error::Version { theirs: LATER, .. }), "{answers:?}: {refused}");
        assert!(refused.to_string().ends_with("upgrade csi-node"), "{refused}");
        assert!(start.elapsed() < PATIENCE / 2, "{answers:?}: it was asked again and again");
    }
    let path = dir.path().join("older");
    answer_with(&path, &[&[VERSION - 1, 0]]);
    let refused = Holder::connect(&path, "test", PATIENCE).expect_err("it was accepted");
    assert!(refused.to_string().ends_with("upgrade fuse-holder"), "{refused}");
}

#[test]
fn no_later_answer_of_another_version_is_taken_for_one_either() {
    const HELLO: &[u8] = &[VERSION, 0];
    let dir = tempfile::tempdir().unwrap();
    let later: [&'static [&'static [u8]]; 4] =
        [&[HELLO, &[LATER, 0]], &[HELLO, &[LATER, 1]], &[HELLO, &[LATER, 2]], &[HELLO, &[LATER, 99]]];
    for (number, answers) in later.into_iter().enumerate() {
        let path = dir.path().join(number.to_string());
        answer_with(&path, answers);
        let holder = Holder::connect(&path, "test", PATIENCE).unwrap();
        let asked = [holder.put("a", fuse()).err(), holder.get("a").err(), holder.remove("a").err(), holder.list().err()];
        assert!(asked.iter().all(|error| matches!(error, Some(Error::Version { theirs: LATER, .. }))), "{answers:?}: {asked:?}");
    }
}

#[test]
fn two_processes_do_not_have_the_descriptors_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("holder.sock");
    let holder = start(&path);
    let first = Holder::connect(&path, "first", PATIENCE).unwrap();
    first.put("a", fuse()).unwrap();
    // Debian's own perl says hello, from another process.
    let hello = r#"use Socket; socket(S, PF_UNIX, 5, 0); connect(S, sockaddr_un($ARGV[0])) or die; send(S, "\x01\x01x", 0);
        recv(S, $b, 16, 0); print unpack("H*", $b)"#;
    let second = || {
        let output = Command::new("perl").args(["-e", hello]).arg(&path).output().expect("perl");
        String::from_utf8(output.stdout).expect("hexadecimal digits")
    };
    assert_eq!(second(), "0104", "busy");
    assert_eq!(first.list().unwrap(), ["a"]);
    // Nobody that lives has been there before it.
    drop(first);
    end(holder);
    let holder = start(&path);
    let deadline = Instant::now() + PATIENCE;
    while second() != "0100" {
        assert!(Instant::now() < deadline, "it was never done");
        thread::sleep(Duration::from_millis(20));
    }
    let third = Holder::connect(&path, "third", PATIENCE).unwrap();
    assert!(third.list().unwrap().iter().all(|name| name == "a"));
    end(holder);
}
