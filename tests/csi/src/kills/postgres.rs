//! PostgreSQL on a volume, and a client that knows which commits were acknowledged.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use lockstep_native::{run, text};
use rustix::process::{Pid, Signal, kill_process};

use super::loads::Seen;

/// A server that does not answer by then does not start. It may have to recover.
const PATIENCE: Duration = Duration::from_secs(120);

/// Of the newest version that is installed.
fn program(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("the package postgresql is installed (tests/csi/install postgresql)");
    let mut found: Vec<PathBuf> =
        versions.flatten().map(|version| version.path().join("bin").join(name)).filter(|path| path.exists()).collect();
    found.sort();
    found.pop().unwrap_or_else(|| panic!("the package postgresql has no {name}"))
}

/// It does not run as root. Ends with us.
fn as_postgres(name: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig", "KILL"]).arg(program(name));
    command.stdin(Stdio::null());
    command
}

/// A server whose socket and log are in a directory of its own.
pub(super) struct Server {
    process: Child,
    sockets: PathBuf,
}

impl Server {
    /// On this data, made new if it is not there.
    pub(super) fn start(data: &Path, sockets: &Path) -> io::Result<Self> {
        fs::create_dir_all(sockets)?;
        let user: u32 = run("id", &["-u", "postgres"]).trim().parse().map_err(io::Error::other)?;
        chown(sockets, Some(user), None)?;
        if !data.exists() {
            fs::create_dir(data)?;
            chown(data, Some(user), None)?;
            let made = as_postgres("initdb").arg("-D").arg(data).args(["--auth=trust", "--no-locale", "--encoding=UTF8"]).output()?;
            if !made.status.success() {
                return Err(io::Error::other(String::from_utf8_lossy(&made.stderr)));
            }
        }
        let log = || File::options().create(true).append(true).open(sockets.join("log"));
        let mut server = as_postgres("postgres");
        server.arg("-D").arg(data).arg("-k").arg(sockets).stdout(log()?).stderr(log()?);
        for setting in [
            "listen_addresses=",
            "shared_buffers=16MB",
            "max_connections=10",
            "min_wal_size=32MB",
            "max_wal_size=64MB",
            "checkpoint_timeout=30s",
        ] {
            server.args(["-c", setting]);
        }
        let mut server = Self { process: server.spawn()?, sockets: sockets.to_owned() };
        let deadline = Instant::now() + PATIENCE;
        while server.query("SELECT 1").is_err() {
            if server.process.try_wait()?.is_some() || Instant::now() >= deadline {
                return Err(io::Error::other(format!("PostgreSQL does not start: {}", server.said())));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    fn psql(&self) -> Command {
        let mut command = Command::new(program("psql"));
        command.arg("-h").arg(&self.sockets).args(["-U", "postgres", "-d", "postgres", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1"]);
        command
    }

    /// What it answers.
    fn query(&self, text: &str) -> io::Result<String> {
        let output = self.psql().args(["-c", text]).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&output.stderr)));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// The end of its log.
    fn said(&self) -> String {
        let log = fs::read_to_string(self.sockets.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Server {
    /// At once, without a last checkpoint: the next one recovers from its log.
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.process), Signal::QUIT);
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.process.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        drop(self.process.kill());
    }
}

/// Commits one row after the other to a server of its own on the volume in `dir`, until it is to stop.
pub(super) fn commit(dir: &Path, sockets: &Path, seen: &Seen, stop: &dyn Fn() -> bool) -> io::Result<()> {
    let server = Server::start(&dir.join("data"), sockets)?;
    server.query("CREATE TABLE commits (n bigint PRIMARY KEY, payload text NOT NULL)")?;
    let mut psql = server.psql().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (mut ask, answers) = (psql.stdin.take().expect("piped"), psql.stdout.take().expect("piped"));
    let mut answers = BufReader::new(answers).lines();
    for number in 1u64.. {
        if stop() {
            break;
        }
        writeln!(ask, "INSERT INTO commits VALUES ({number}, md5('{number}'));")?;
        match answers.next().transpose()?.as_deref() {
            Some("INSERT 0 1") => seen.rows.store(number, Ordering::Relaxed),
            Some(other) => return Err(io::Error::other(other.to_owned())),
            None => {
                let said = psql.wait_with_output()?;
                return Err(io::Error::other(format!("{}\n{}", String::from_utf8_lossy(&said.stderr), server.said())));
            }
        }
        thread::sleep(Duration::from_millis(3));
    }
    drop(ask);
    psql.wait().map(drop)
}

/// How many of the first `committed` rows are not on this copy of the volume, as another server says that recovers from a copy of it.
pub(super) fn lost(copy: &Path, fs_type: &str, work: &Path, committed: u64) -> io::Result<u64> {
    let (image, mount) = (work.join("image"), work.join("mount"));
    fs::create_dir_all(&mount)?;
    run("cp", &["--sparse=always", text(copy), text(&image)]);
    let options = if fs_type == "xfs" { "loop,nouuid" } else { "loop" };
    run("mount", &["-t", fs_type, "-o", options, text(&image), text(&mount)]);
    let found = Server::start(&mount.join("data"), &work.join("sockets")).and_then(|server| {
        let good = server.query(&format!("SELECT count(*) FROM commits WHERE n <= {committed} AND payload = md5(n::text)"))?;
        good.parse::<u64>().map_err(io::Error::other)
    });
    run("umount", &[text(&mount)]);
    fs::remove_file(&image)?;
    Ok(committed - found?)
}
