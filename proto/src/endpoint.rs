//! The unix socket that a binary serves CSI on.

use std::{
    fmt,
    fs::{self, Permissions},
    io,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

/// An absolute path of a unix socket, written `unix:///path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(PathBuf);

/// Why there is no socket to serve on.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// It is not the address of a unix socket.
    #[error("{0:?} is not an endpoint: write unix:// and the socket's absolute path, as in unix:///run/lockstep/controller.sock")]
    Syntax(String),
    /// Somebody answers there.
    #[error("another process serves on {0}: end it first, or choose another --endpoint")]
    InUse(PathBuf),
    /// Something else is there. It is left alone.
    #[error("{0} is there, but is not a socket: move it away, or choose another --endpoint")]
    NotASocket(PathBuf),
    /// The system failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    /// Takes `unix:///path` and `unix:/path`.
    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let rest = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:"));
        match rest.map(Path::new) {
            Some(path) if path.is_absolute() && path.file_name().is_some() => Ok(Self(path.to_owned())),
            _ => Err(EndpointError::Syntax(text.to_owned())),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix://{}", self.0.display())
    }
}

impl Endpoint {
    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Removes the socket of a process that still has it open and will never answer. Nothing there: nothing done.
    ///
    /// # Errors
    /// If a file that is not a socket is there, or if the system fails.
    pub fn take_away(&self) -> Result<(), EndpointError> {
        let path = self.path();
        match fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => Err(EndpointError::NotASocket(path.to_owned())),
            Ok(_) => fs::remove_file(path).map_err(|source| EndpointError::Io { what: "removing", path: path.to_owned(), source }),
            Err(_) => Ok(()),
        }
    }

    /// Listens, for tonic's `serve_with_incoming`. Only the own user may connect. A socket that a dead process left is replaced.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If somebody serves there, if a file that is not a socket is there, or if the system fails.
    pub fn bind(&self) -> Result<UnixListenerStream, EndpointError> {
        let path = self.path();
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| EndpointError::Io { what, path, source }
        };
        let parent = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(failed("creating", parent))?;
        match fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => return Err(EndpointError::NotASocket(path.to_owned())),
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {}
                // Whatever else happens: somebody is there who could answer.
                _ => return Err(EndpointError::InUse(path.to_owned())),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("looking at", path)(error)),
        }
        // Bound beside its place and renamed: nobody connects before the permissions are right, and a stale socket is replaced at once.
        let beside = parent.join(format!(".{}", std::process::id()));
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("removing", &beside)(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&beside).map_err(failed("binding", &beside))?;
        fs::set_permissions(&beside, Permissions::from_mode(0o600)).map_err(failed("setting the permissions of", &beside))?;
        fs::rename(&beside, path).map_err(failed("renaming a socket to", path))?;
        Ok(UnixListenerStream::new(listener))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(dir: &Path) -> Endpoint {
        format!("unix://{}/run/x.sock", dir.display()).parse().unwrap()
    }

    #[test]
    fn an_endpoint_is_the_absolute_path_of_a_unix_socket() {
        for text in ["unix:///run/x.sock", "unix:/run/x.sock"] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.path(), Path::new("/run/x.sock"));
            assert_eq!(endpoint.to_string(), "unix:///run/x.sock");
        }
        for text in ["", "/run/x.sock", "unix://", "unix://run/x.sock", "unix:x.sock", "unix:///", "tcp://127.0.0.1:1", "dns:///x"] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains("write unix://"), "{error}");
        }
    }

    #[tokio::test]
    async fn the_socket_is_the_own_users_and_its_directory_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = endpoint(dir.path());
        let _listener = endpoint.bind().unwrap();
        assert_eq!(fs::metadata(endpoint.path()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(endpoint.path().parent().unwrap()).unwrap().count(), 1, "nothing else is left beside it");
        UnixStream::connect(endpoint.path()).unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_somebody_serves_is_refused_and_one_that_a_dead_process_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = endpoint(dir.path());
        let listener = endpoint.bind().unwrap();
        assert!(matches!(endpoint.bind(), Err(EndpointError::InUse(path)) if path == endpoint.path()));
        drop(listener);
        assert!(endpoint.path().exists());
        let _listener = endpoint.bind().unwrap();
        UnixStream::connect(endpoint.path()).unwrap();
    }

    #[tokio::test]
    async fn a_file_that_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = endpoint(dir.path());
        fs::create_dir(endpoint.path().parent().unwrap()).unwrap();
        fs::write(endpoint.path(), "mine").unwrap();
        assert!(matches!(endpoint.bind(), Err(EndpointError::NotASocket(_))));
        assert_eq!(fs::read_to_string(endpoint.path()).unwrap(), "mine");
    }
}
