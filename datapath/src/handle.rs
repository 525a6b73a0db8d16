//! What the rest of the process holds: the datapath and its volumes.

use std::{
    fs::OpenOptions,
    io::Read,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lockstep_core::{
    Mirror,
    assembly::{Assembly, Limits, assemble},
    format::{self, MetaError},
    io::{Effects, Fill, Notice, Request},
    status::{LegState, Status},
    units::{BLOCK_SIZE, Epoch, Errno, Instant, LegId, Slot, VolumeId},
};
use lockstep_fuse_holder::Holder;
use tokio::sync::{Mutex, broadcast, mpsc, oneshot, watch};
use tracing::{debug, warn};

use crate::{
    abi::{fuse, loop_device::LoopDevice},
    device::{self, Mount},
    error::{Context, Error},
    fence::{self, Before, Legs},
    leg::{self, OpenLeg},
    thread::Thread,
    volume::{Command, Start},
};

/// Where a leg is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LegPath {
    /// The directory with `data` and `meta`.
    pub dir: PathBuf,
}

/// What is to be opened.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    /// The volume: the UID of its object.
    pub volume: VolumeId,
    /// Every leg that was found.
    pub legs: Vec<LegPath>,
    /// The witness file.
    pub witness: PathBuf,
    /// The epoch that the object's status last saw.
    pub seen_epoch: Option<Epoch>,
    /// The operator insists on this leg.
    pub force: Option<LegId>,
    /// Where the FUSE file is mounted, under the volume's id.
    pub run_dir: PathBuf,
}

/// How a node's datapath is set up. The defaults are for production.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How many threads, each with a ring and payload memory of its own; at least 1.
    pub threads: usize,
    /// Entries of each thread's submission ring, from 1 to 32768; the kernel makes it a power of two. The completion ring has 128 times as many, up to 65536.
    /// A full ring is submitted at once, an emptier one when the thread has nothing else to do: the disks begin with the first of many
    /// requests while the thread still takes up the others.
    pub ring_entries: u32,
    /// What each mirror bounds itself by.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self { threads: 1, ring_entries: 16, limits: Limits::default() }
    }
}

/// The datapath threads of a node.
#[derive(Debug)]
pub struct Datapath {
    threads: Vec<Thread>,
    limits: Limits,
    /// Who keeps the volumes' connections when this process ends.
    holder: Option<Arc<Holder>>,
}

/// An open volume. Dropping it without `close` leaves its device behind, as a kill would.
#[derive(Debug)]
pub struct Volume {
    name: String,
    device: PathBuf,
    state: Mutex<Option<Arc<(Mount, LoopDevice)>>>,
    legs: Mutex<[Option<PathBuf>; 2]>,
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Status>,
    notices: broadcast::Sender<Notice>,
    /// Has what happened since before the first event.
    first: std::sync::Mutex<Option<broadcast::Receiver<Notice>>>,
    returning: Vec<(LegPath, Slot, Fill)>,
    witness: PathBuf,
    holder: Option<Arc<Holder>>,
}

/// A mirror that was assembled, and what comes of its volume.
struct Assembled {
    name: String,
    mirror: Mirror,
    effects: Effects,
    status: Status,
    legs: [Option<OpenLeg>; 2],
    witness: std::fs::File,
    returning: Vec<(LegPath, Slot, Fill)>,
}

struct Opened {
    start: Start,
    commands: mpsc::Sender<Command>,
    mount: Mount,
    legs: [Option<PathBuf>; 2],
    returning: Vec<(LegPath, Slot, Fill)>,
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Error::Panicked))
}

impl Datapath {
    /// Starts this many threads. With a holder, volumes outlive this process (`resume`).
    ///
    /// # Errors
    /// `Error::Io` if a thread cannot be started.
    pub fn start(threads: usize, holder: Option<Arc<Holder>>) -> Result<Self, Error> {
        Self::start_with(Settings { threads, ..Settings::default() }, holder)
    }

    /// Starts threads that are set up so.
    ///
    /// # Errors
    /// `Error::Io` if a thread cannot be started.
    pub fn start_with(settings: Settings, holder: Option<Arc<Holder>>) -> Result<Self, Error> {
        let Settings { threads, ring_entries, limits } = settings;
        let threads = (0..threads.max(1)).map(|number| Thread::start(number, ring_entries)).collect::<Result<_, _>>();
        Ok(Self { threads: threads.context(|| "starting a datapath thread".into())?, limits, holder })
    }

    /// Fences the legs, assembles the mirror and makes its block device. What an earlier process left behind for the volume is removed
    /// first. A leg that cannot be opened is left out, if the mirror may do without it.
    ///
    /// # Errors
    /// `Error::Refused`, `Error::Damaged`, `Error::AllDamaged` if the mirror must not be used as it was found; `Error::LegBusy`: try again; `Error::Io`, `Error::Truncated`,
    /// `Error::NoFlush`, `Error::Holder`.
    pub async fn open(&self, spec: VolumeSpec) -> Result<Volume, Error> {
        let (witness, holder, name) = (spec.witness.clone(), self.holder.clone(), spec.volume.to_string());
        let limits = self.limits;
        debug!(volume = name, in_use = false, "assembling");
        let kept = holder.clone();
        let opened = blocking(move || open(&spec, kept.as_deref(), limits)).await?;
        let mount = opened.mount.clone();
        let fuse = opened.start.fuse.try_clone().context(|| "copying a descriptor".into());
        let served = match self.serve(opened).await {
            Ok(served) => served,
            Err(error) => {
                drop(blocking(move || mount.unmount()).await);
                return Err(error);
            }
        };
        let attached = blocking(move || {
            let attached = fuse.and_then(|fuse| Ok((mount.attach_loop(&name)?, fuse)));
            // Not before: what a process waits for that is killed in the attaching must end with it.
            let held = attached.and_then(|(device, fuse)| match holder.map_or(Ok(()), |holder| holder.put(&name, fuse)) {
                Ok(()) => Ok(device),
                Err(error) => {
                    drop(device::detach(&device));
                    Err(error.into())
                }
            });
            match held {
                Ok(device) => Ok((mount, device)),
                Err(error) => {
                    drop(mount.unmount());
                    Err(error)
                }
            }
        });
        let attached = attached.await?;
        Ok(served.volume(attached, witness, self.holder.clone()))
    }

    /// Serves a volume's device on from where an earlier process ended: fences the legs, assembles the mirror, and has the kernel send again
    /// what was not answered. A leg whose last I/O is not over by the deadline of leg I/O is left out, if the mirror may do without it (mirror
    /// rule 25). `None`: the holder has nothing of this volume, or its device is gone; then nothing was done.
    ///
    /// # Errors
    /// As `open`'s. After one the device's users still wait: try again, or end it (`remove_leftovers`).
    pub async fn resume(&self, spec: VolumeSpec) -> Result<Option<Volume>, Error> {
        let Some(holder) = self.holder.clone() else { return Ok(None) };
        let (witness, limits) = (spec.witness.clone(), self.limits);
        let resumed = blocking(move || {
            let name = spec.volume.to_string();
            let Some(attached) = device::existing(&spec.run_dir, &name)? else { return Ok(None) };
            let Some(fuse) = holder.get(&name)? else { return Ok(None) };
            debug!(volume = name, in_use = true, "assembling");
            let limit = Duration::from_millis(limits.leg_deadline_millis);
            let before = if holder.before_is_dying() { Before::Dying } else { Before::Ended };
            let legs = fence::open_legs_by(&spec.legs, limit, before);
            if before == Before::Dying {
                let witness = OpenOptions::new().write(true).open(&spec.witness);
                witness.and_then(|file| fence::drain(&file)).context(|| format!("waiting for writes to {}", spec.witness.display()))?;
            }
            let assembled = assembled(&spec, legs, limits)?;
            rustix::io::write(&fuse, &fuse::resend()).context(|| format!("asking for the requests of {name} again"))?;
            Ok(Some((assembled.opened(attached.0.clone(), fuse), attached)))
        });
        let Some((opened, attached)) = resumed.await? else { return Ok(None) };
        let served = self.serve(opened).await?;
        Ok(Some(served.volume(attached, witness, self.holder.clone())))
    }

    /// The volumes that an earlier process served, by their ids; `resume` may take them up. Blocks.
    ///
    /// # Errors
    /// `Error::Holder`.
    pub fn resumable(&self) -> Result<Vec<String>, Error> {
        self.holder.as_ref().map_or(Ok(Vec::new()), |holder| Ok(holder.list()?))
    }

    /// Waits until every thread has answered, or waits in the kernel for a disk.
    ///
    /// # Errors
    /// `Error::Gone` if one has ended, `Error::Stuck` if one does neither within `limit`.
    pub async fn heartbeat(&self, limit: Duration) -> Result<(), Error> {
        futures::future::try_join_all(self.threads.iter().map(|thread| thread.heartbeat(limit))).await.map(drop)
    }

    /// Whether volumes outlive this process.
    pub fn has_holder(&self) -> bool {
        self.holder.is_some()
    }

    /// Removes what a process that ended left behind for this volume: its FUSE connection, its loop device and its FUSE mount. The file system
    /// on the device must be unmounted by then, or the loop device goes with its last user, who is waited for, for ten seconds. Nothing left: nothing
    /// done. Blocks.
    ///
    /// # Errors
    /// `Error::Io`, `Error::Holder`.
    pub fn remove_leftovers(&self, run_dir: &Path, name: &str) -> Result<(), Error> {
        device::wait_until_gone(&remove_leftovers(self.holder.as_deref(), run_dir, name)?);
        Ok(())
    }

    /// Ends what an earlier process served and this one cannot: every request on it fails from now on. Blocks.
    ///
    /// # Errors
    /// `Error::Holder`.
    pub fn let_go(&self, name: &str) -> Result<(), Error> {
        self.holder.as_ref().map_or(Ok(()), |holder| Ok(holder.remove(name)?))
    }

    /// Hands an assembled mirror to the thread that has least to do.
    async fn serve(&self, opened: Opened) -> Result<Served, Error> {
        let thread = self.threads.iter().min_by_key(|thread| thread.volumes()).ok_or(Error::Gone)?;
        let Opened { start, commands, legs, returning, .. } = opened;
        let (status, notices) = (start.status.subscribe(), start.notices.clone());
        let served = Served { name: start.name.clone(), commands, legs, returning, status, first: notices.subscribe(), notices };
        match thread.add(start).await {
            Ok(()) => Ok(served),
            Err(()) => Err(Error::Gone),
        }
    }
}

/// A volume on its datapath thread.
struct Served {
    name: String,
    commands: mpsc::Sender<Command>,
    legs: [Option<PathBuf>; 2],
    returning: Vec<(LegPath, Slot, Fill)>,
    status: watch::Receiver<Status>,
    notices: broadcast::Sender<Notice>,
    first: broadcast::Receiver<Notice>,
}

impl Served {
    fn volume(self, attached: (Mount, LoopDevice), witness: PathBuf, holder: Option<Arc<Holder>>) -> Volume {
        Volume {
            name: self.name,
            device: attached.1.path().to_owned(),
            state: Mutex::new(Some(Arc::new(attached))),
            legs: Mutex::new(self.legs),
            commands: self.commands,
            status: self.status,
            notices: self.notices,
            first: std::sync::Mutex::new(Some(self.first)),
            returning: self.returning,
            witness,
            holder,
        }
    }
}

fn remove_leftovers(holder: Option<&Holder>, run_dir: &Path, name: &str) -> Result<Vec<LoopDevice>, Error> {
    if let Some(holder) = holder {
        // Nobody waits for it any more from here on.
        holder.remove(name)?;
    }
    device::remove_leftovers(run_dir, name)
}

fn open(spec: &VolumeSpec, holder: Option<&Holder>, limits: Limits) -> Result<Opened, Error> {
    let name = spec.volume.to_string();
    remove_leftovers(holder, &spec.run_dir, &name)?;
    let assembled = assembled(spec, fence::open_legs(&spec.legs)?, limits)?;
    for leg in assembled.legs.iter().flatten() {
        if let Err(error) = leg.allocate(assembled.status.blocks * BLOCK_SIZE) {
            // If the disk is failing, the mirror will see for itself; if it is full, writes to new space are refused.
            warn!(%error, "a leg's space could not be made sure of");
        }
    }
    let (mount, fuse) = device::mount_fuse(&spec.run_dir, &name)?;
    Ok(assembled.opened(mount, fuse))
}

fn assembled(spec: &VolumeSpec, Legs { open: found, left_out }: Legs, limits: Limits) -> Result<Assembled, Error> {
    let mut witness = Vec::new();
    let witness_file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_DSYNC)
        .open(&spec.witness)
        .context(|| format!("opening {}", spec.witness.display()))?;
    (&witness_file).take(format::WITNESS_LEN).read_to_end(&mut witness).context(|| format!("reading {}", spec.witness.display()))?;

    let metas: Vec<&[u8]> = found.iter().map(|leg| leg.meta.as_slice()).collect();
    let assembly = Assembly {
        volume: spec.volume,
        metas: &metas,
        witness: (!witness.is_empty()).then_some(witness.as_slice()),
        seen_epoch: spec.seen_epoch,
        force: spec.force,
        seed: uuid::Uuid::new_v4().as_u128(),
        now: Instant(0),
        limits,
    };
    let mut effects = Effects::new();
    let assembled = assemble(&assembly, &mut effects).map_err(|refusal| {
        let damaged = found.iter().filter(|leg| format::peek(&leg.meta).map(|summary| summary.volume) != Ok(spec.volume));
        let damaged = damaged.map(|leg| Error::Meta { path: leg.dir.join("meta"), source: MetaError::Damaged });
        Error::refused(refusal, damaged.chain(left_out).collect())
    })?;
    let status = assembled.mirror.status();
    let bytes = status.blocks * BLOCK_SIZE;
    let returning = assembled.returning.iter().map(|(index, slot, fill)| (LegPath { dir: found[*index].dir.clone() }, *slot, *fill));
    let returning = returning.collect();
    let mut found: Vec<Option<OpenLeg>> = found.into_iter().map(Some).collect();
    let mut legs = assembled.slots.map(|index| index.and_then(|index| found[index].take()));
    for slot in 0..2 {
        let Some(leg) = &legs[slot] else { continue };
        if leg.len < bytes {
            let error = Error::Truncated { path: leg.dir.join("data"), found: leg.len, wanted: bytes };
            let other = legs[1 - slot].as_ref().is_some_and(|other| other.len >= bytes);
            if !other {
                return Err(error);
            }
            // Its first I/O fails, and the mirror takes it OUT.
            warn!(%error, "a leg is left out");
            legs[slot] = None;
        }
    }
    Ok(Assembled { name: spec.volume.to_string(), mirror: assembled.mirror, effects, status, legs, witness: witness_file, returning })
}

impl Assembled {
    fn opened(self, mount: Mount, fuse: OwnedFd) -> Opened {
        let dirs = [0, 1].map(|slot: usize| self.legs[slot].as_ref().map(|leg| leg.dir.clone()));
        let (commands, incoming) = mpsc::channel(16);
        let start = Start {
            name: self.name,
            mirror: self.mirror,
            effects: self.effects,
            legs: self.legs,
            witness: self.witness,
            fuse,
            commands: incoming,
            status: watch::Sender::new(self.status),
            notices: broadcast::Sender::new(256),
        };
        Opened { start, commands, mount, legs: dirs, returning: self.returning }
    }
}

impl Volume {
    /// Its block device.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Its name: the volume's id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its witness file.
    pub fn witness(&self) -> &Path {
        &self.witness
    }

    /// The mirror's status, as it changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// What happens: the first time this is called, from the opening on; later, from now on.
    pub fn notices(&self) -> broadcast::Receiver<Notice> {
        let first = self.first.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        first.unwrap_or_else(|| self.notices.subscribe())
    }

    /// Stale legs that were found at opening and how they can come back (`attach`).
    pub fn returning(&self) -> &[(LegPath, Slot, Fill)] {
        &self.returning
    }

    async fn ask(&self, command: impl FnOnce(oneshot::Sender<Result<(), Errno>>) -> Command) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Error::Gone)?;
        answer.await.map_err(|_| Error::Gone)?.map_err(Error::Mirror)
    }

    async fn submit(&self, request: Request) -> Result<(), Error> {
        self.ask(|reply| Command::Submit(request, reply)).await
    }

    /// Puts a leg into a slot whose leg is OUT. Returns when it is durably RECOVERING; `notices` tells when it is IN. With
    /// `Fill::Everything` the leg must be new and empty (`create_leg` with `format::spare_leg`).
    ///
    /// # Errors
    /// `Error::Mirror(EBUSY)`: the slot's leg still counts, or I/O to it is not over. `Error::Truncated`: only `Fill::Everything` would do.
    pub async fn attach(&self, slot: Slot, path: LegPath, fill: Fill) -> Result<(), Error> {
        // Not while it grows: the leg would be too short.
        let mut legs = self.legs.lock().await;
        let bytes = self.status.borrow().blocks * BLOCK_SIZE;
        let dir = path.dir.clone();
        let open = blocking(move || {
            let leg = OpenLeg::open(&dir, fence::FENCE_DEADLINE, Before::Ended)?;
            let summary = format::peek(&leg.meta).map_err(|source| Error::Meta { path: dir.join("meta"), source })?;
            leg.whole(summary.blocks)?;
            leg.allocate(bytes)?;
            Ok((leg, summary))
        });
        let (leg, summary) = open.await?;
        let request = Request::Attach { slot, leg: summary.leg, fill, newest: summary.newest };
        self.ask(|reply| Command::Attach { slot, leg: Box::new(leg), request, reply }).await?;
        legs[slot.index()] = Some(path.dir);
        Ok(())
    }

    /// How the leg in `path` may come back: its slot, and whether the dirty regions will do. `None`: it is not one of this mirror's legs,
    /// and can only be removed.
    ///
    /// # Errors
    /// `Error::Io`, `Error::Meta`, `Error::Gone`.
    pub async fn readmission(&self, path: &LegPath) -> Result<Option<(Slot, Fill)>, Error> {
        let dir = path.dir.clone();
        let meta = blocking(move || {
            let file = dir.join("meta");
            let meta = std::fs::read(&file).context(|| format!("reading {}", file.display()))?;
            let summary = format::peek(&meta).map_err(|source| Error::Meta { path: file, source })?;
            let data = dir.join("data");
            let len = std::fs::metadata(&data).context(|| format!("reading the size of {}", data.display()))?.len();
            Ok((meta, len >= summary.blocks * BLOCK_SIZE))
        });
        let (meta, whole) = meta.await?;
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Readmission(meta, reply)).await.map_err(|_| Error::Gone)?;
        let answer = answer.await.map_err(|_| Error::Gone)?;
        // What was cut off its end is not among the dirty regions.
        Ok(answer.map(|(slot, fill)| (slot, if whole { fill } else { Fill::Everything })))
    }

    /// Takes a leg out.
    ///
    /// # Errors
    /// `Error::Mirror(EBUSY)`: it is the last one that counts.
    pub async fn detach(&self, slot: Slot) -> Result<(), Error> {
        self.submit(Request::Detach(slot)).await
    }

    /// Makes the volume `bytes` long, if it is not: first the legs that count or are being filled, then the mirror, then the device. May be
    /// called again after an error.
    ///
    /// # Errors
    /// `Error::Io` if a leg's disk has no room: the volume has its old size then.
    pub async fn grow(&self, bytes: u64) -> Result<(), Error> {
        let legs = self.legs.lock().await;
        let status = *self.status.borrow();
        let old = status.blocks * BLOCK_SIZE;
        if bytes > old {
            let here = Slot::BOTH.into_iter().filter(|slot| status.legs[slot.index()].state != LegState::Out);
            for dir in here.filter_map(|slot| legs[slot.index()].clone()) {
                blocking(move || leg::extend_leg(&dir, bytes)).await?;
            }
            self.submit(Request::Grow { blocks: bytes / BLOCK_SIZE }).await?;
        }
        let device = self.device.clone();
        if device_bytes(&device)? >= bytes {
            return Ok(());
        }
        self.ask(Command::InvalidateAttributes).await?;
        let state = self.state.lock().await.clone();
        let attached = state.ok_or(Error::Gone)?;
        blocking(move || attached.0.refresh_size(&attached.1)).await
    }

    /// Says which leg is slow, if any: it is not read from as long as the other can be, and writes are answered before they are on it (mirror
    /// rule 32: a write that was answered and not flushed may be lost if the other leg's disk and this process end together). Good until the
    /// volume is opened anew or another leg is attached. `status` tells when it is so.
    ///
    /// # Errors
    /// `Error::Gone`.
    pub async fn write_mostly(&self, slow: Option<Slot>) -> Result<(), Error> {
        self.submit(Request::WriteMostly { slot: slow, behind: slow.is_some() }).await
    }

    /// Compares the legs wherever something was ever written, and returns at the end of that; `status` and `notices` say what differs. It is
    /// left as it is, unless a leg is `believed`: then the other one is given what that one holds.
    ///
    /// # Errors
    /// `Error::Mirror`: EBUSY: one is under way; ENODEV: a leg is or was lost; ECANCELED, ESHUTDOWN: it was stopped, or the mirror was.
    pub async fn scrub(&self, believed: Option<Slot>) -> Result<(), Error> {
        self.submit(Request::Scrub { believed }).await
    }

    /// Ends the scrub that is under way, if there is one.
    ///
    /// # Errors
    /// `Error::Gone`.
    pub async fn stop_scrub(&self) -> Result<(), Error> {
        self.submit(Request::StopScrub).await
    }

    /// Makes every answered write durable.
    ///
    /// # Errors
    /// `Error::Mirror` if no leg could.
    pub async fn flush(&self) -> Result<(), Error> {
        self.submit(Request::Flush).await
    }

    /// Detaches the device, stops the mirror cleanly and lets go of the legs. The device's users must be gone. A mirror that cannot be stopped
    /// cleanly is let go of as if the process had been killed: its dirty bits say what may differ. May be called again after an error.
    ///
    /// # Errors
    /// `Error::Io`.
    pub async fn close(&self) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        if let Some(attached) = state.clone() {
            let detached = Arc::clone(&attached);
            blocking(move || device::detach(&detached.1)).await?;
            // The kernel may still be letting go of the device; what it sends until then is served.
            match self.submit(Request::Stop).await {
                // An earlier call came as far as this.
                Ok(()) | Err(Error::Mirror(Errno::ESHUTDOWN)) => {}
                Err(error) => warn!(%error, "the mirror could not be stopped cleanly"),
            }
            blocking(move || attached.0.unmount()).await?;
            if let Some(holder) = self.holder.clone() {
                let name = self.name.clone();
                blocking(move || Ok(holder.remove(&name)?)).await?;
            }
            *state = None;
        }
        match self.ask(Command::Close).await {
            // Nobody is left who could be told.
            Err(Error::Gone) => Ok(()),
            closed => closed,
        }
    }
}

/// The size that a block device shows.
fn device_bytes(device: &Path) -> Result<u64, Error> {
    let path = Path::new("/sys/block").join(device.file_name().unwrap_or_default()).join("size");
    let text = std::fs::read_to_string(&path).context(|| format!("reading {}", path.display()))?;
    Ok(text.trim().parse::<u64>().unwrap_or(0) * 512)
}
