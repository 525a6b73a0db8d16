//! Payload memory: one bounded pool per datapath thread, allocated once.
//!
//! A buffer goes back to the pool when the last holder lets go of it: the request, and every leg I/O that uses it. So a late I/O keeps
//! its memory, whatever became of its request (mirror rule 27).
//!
//! A disk that hangs may hold every buffer for as long as it likes. So when a leg is OUT, the pool gets as much new memory as the leg's I/O has,
//! and gives it back as that ends: no more than the pool once again for each leg that hangs.
//!
//! Until then, up to the deadline of its I/O, it may have all that there is, and the thread's other volumes would wait for it. So once a class has
//! been used up for `PATIENCE`, and nothing came back, a volume that has less than its share of requests under way (`volume/share.rs`) is given
//! memory beyond the pool, which is gone when the request ends; and so is a copy, of which a volume has `COPY_WINDOW` pieces at most.
//!
//! Copies have buffers of their own: a copy that holds its range never waits for a client's request to end.
#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    cell::{Cell, RefCell},
    io,
    ptr::NonNull,
    rc::Rc,
    time::{Duration, Instant},
};

use tokio::sync::Notify;
use tokio_uring::buf::fixed::FixedBufRegistry;

pub(crate) const PAGE: usize = 4096;
/// A class that was used up for so long, while nothing came back, is held by a disk that hangs, or that is as slow as that.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Requests of up to 32 KiB.
    Small,
    /// Requests of up to 1 MiB, after one page for the FUSE header: a request is read so that its payload is page-aligned.
    Large,
    /// Pieces that resync and rebuild copy.
    Copy,
    /// One metadata page.
    Meta,
}

impl Class {
    pub(crate) const ALL: [Class; 4] = [Class::Small, Class::Large, Class::Copy, Class::Meta];

    /// What a payload of so many bytes needs.
    pub(crate) const fn of_payload(bytes: usize) -> Self {
        if bytes <= Class::Small.bytes() { Class::Small } else { Class::Large }
    }

    pub(crate) const fn bytes(self) -> usize {
        match self {
            Class::Small => 32 << 10,
            Class::Large => (1 << 20) + PAGE,
            Class::Copy => 1 << 20,
            Class::Meta => PAGE,
        }
    }

    /// How many of them a thread has: 512 x 32 KiB + 40 x 1 MiB + 8 x 1 MiB, 64 MiB in all. Of metadata pages there
    /// are a few for each volume at most, and more are made when these are used up.
    const fn count(self) -> usize {
        match self {
            Class::Small => 512,
            Class::Large => 40,
            Class::Copy => 8,
            Class::Meta => 64,
        }
    }
}

/// All memory of a pool, in one piece of huge pages: the kernel looks each page up that an I/O touches, and so it has fewer to look up.
#[derive(Debug)]
struct Arena {
    base: NonNull<u8>,
    len: usize,
    mapping: (*mut libc::c_void, usize),
}

const HUGE_PAGE: usize = 2 << 20;

impl Arena {
    fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.next_multiple_of(HUGE_PAGE), HUGE_PAGE).expect("a pool is no larger than memory");
        // SAFETY: an anonymous private mapping, at an address of the kernel's choice, touches nobody's memory.
        let mapping = unsafe {
            let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), layout.size() + HUGE_PAGE, access, kind, -1, 0)
        };
        if mapping == libc::MAP_FAILED {
            handle_alloc_error(layout);
        }
        let first = mapping.cast::<u8>();
        let base = first.wrapping_add(first.align_offset(HUGE_PAGE));
        // SAFETY: the mapping has room for `layout.size()` bytes from any place in its first huge page; this is advice only, and may fail. A
        // child has no use for it, and would be given a copy of what is registered with a ring.
        unsafe {
            libc::madvise(base.cast(), layout.size(), libc::MADV_HUGEPAGE);
            libc::madvise(base.cast(), layout.size(), libc::MADV_DONTFORK);
        }
        let base = NonNull::new(base).expect("a mapping is not at 0");
        Self { base, len: layout.size(), mapping: (mapping, layout.size() + HUGE_PAGE) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: nobody has a pointer into the arena without its `Rc`. I/O that a ring left behind has its pages, mapped or not.
        unsafe { libc::munmap(self.mapping.0, self.mapping.1) };
    }
}

/// The arena for the ring, which keeps it for as long as it is registered.
#[derive(Debug)]
struct Registered(Rc<Arena>);

// SAFETY: the arena does not move, and is unmapped only when the last `Rc` of it is gone.
unsafe impl tokio_uring::buf::IoBuf for Registered {
    fn stable_ptr(&self) -> *const u8 {
        self.0.base.as_ptr()
    }
    fn bytes_init(&self) -> usize {
        self.0.len
    }
    fn bytes_total(&self) -> usize {
        self.0.len
    }
}

// SAFETY: as above; all of it is initialized from the start.
unsafe impl tokio_uring::buf::IoBufMut for Registered {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.0.base.as_ptr()
    }
    unsafe fn set_init(&mut self, _: usize) {}
}

#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    /// It is no part of the arena, but allocated by itself, in place of what a late I/O has.
    spare: Option<Layout>,
}

impl Memory {
    fn spare(class: Class) -> Self {
        let layout = Layout::from_size_align(class.bytes(), PAGE).expect("a buffer is no larger than memory");
        // SAFETY: no class is empty.
        let start = unsafe { alloc_zeroed(layout) };
        Self { start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)), spare: Some(layout) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(layout) = self.spare {
            // SAFETY: allocated with this layout, and nobody else has it.
            unsafe { dealloc(self.start.as_ptr(), layout) }
        }
    }
}

/// The pool.
#[derive(Debug)]
pub(crate) struct Pool {
    free: [RefCell<Vec<Memory>>; 4],
    /// By class: how many buffers late I/O has, and how many there are in their place.
    late: [Cell<(usize, usize)>; 4],
    /// By class: when the last buffer was taken.
    used_up: [Cell<Instant>; 4],
    freed: Notify,
    arena: Rc<Arena>,
    registered: Cell<bool>,
}

impl Pool {
    pub(crate) fn new() -> Rc<Self> {
        let arena = Rc::new(Arena::new(Class::ALL.iter().map(|class| class.bytes() * class.count()).sum()));
        let mut at = 0;
        let mut cut = |class: Class| {
            let memory = (0..class.count()).map(|_| {
                at += class.bytes();
                // SAFETY: the arena is as long as all buffers together.
                Memory { start: unsafe { arena.base.add(at - class.bytes()) }, spare: None }
            });
            RefCell::new(memory.collect())
        };
        let free = Class::ALL.map(&mut cut);
        Rc::new(Self {
            free,
            late: Default::default(),
            used_up: [(); 4].map(|()| Cell::new(Instant::now())),
            freed: Notify::new(),
            arena,
            registered: Cell::new(false),
        })
    }

    /// Makes the pool known to the calling thread's ring: its pages are looked up and locked now, and not by each I/O.
    pub(crate) fn register(&self) -> io::Result<()> {
        FixedBufRegistry::new([Registered(Rc::clone(&self.arena))]).register()?;
        self.registered.set(true);
        Ok(())
    }

    /// So many buffers of this class are a late I/O's: there are others in their place.
    pub(crate) fn replace(&self, class: Class, count: usize) {
        let (late, spare) = self.late[class as usize].get();
        self.late[class as usize].set((late + count, spare + count));
        self.free[class as usize].borrow_mut().extend((0..count).map(|_| Memory::spare(class)));
        self.freed.notify_waiters();
    }

    /// A late I/O gave such a buffer back.
    pub(crate) fn no_longer_late(&self, class: Class) {
        let (late, spare) = self.late[class as usize].get();
        self.late[class as usize].set((late - 1, spare));
        let mut free = self.free[class as usize].borrow_mut();
        if let Some(index) = free.iter().position(|memory| memory.spare.is_some()) {
            free.swap_remove(index);
            self.look_whether_used_up(class, &free);
            self.late[class as usize].set((late - 1, spare - 1));
        }
    }

    fn give_back(&self, class: Class, memory: Memory) {
        let (late, spare) = self.late[class as usize].get();
        if memory.spare.is_some() && spare > late {
            self.late[class as usize].set((late, spare - 1));
        } else {
            self.free[class as usize].borrow_mut().push(memory);
        }
        // Its volume has less than before, also if the pool has no more.
        self.freed.notify_waiters();
    }

    fn look_whether_used_up(&self, class: Class, free: &[Memory]) {
        if free.is_empty() {
            self.used_up[class as usize].set(Instant::now());
        }
    }

    pub(crate) fn available(&self, class: Class) -> bool {
        !self.free[class as usize].borrow().is_empty()
    }

    /// Whether the class has been used up for so long that nobody should wait for the pool alone.
    pub(crate) fn starved(&self, class: Class) -> bool {
        !self.available(class) && self.used_up[class as usize].get().elapsed() >= PATIENCE
    }

    /// Takes one, if there is one.
    pub(crate) fn take(self: &Rc<Self>, class: Class) -> Option<Buffer> {
        let mut free = self.free[class as usize].borrow_mut();
        let memory = free.pop()?;
        self.look_whether_used_up(class, &free);
        Some(Buffer { memory: Some(memory), class, pool: Rc::clone(self) })
    }

    /// Takes one, or makes one more. For what is bounded otherwise, and must not wait for what a disk that hangs has: metadata, and a volume's share.
    pub(crate) fn take_or_make(self: &Rc<Self>, class: Class) -> Buffer {
        self.take(class).unwrap_or_else(|| {
            let (late, spare) = self.late[class as usize].get();
            self.late[class as usize].set((late, spare + 1));
            Buffer { memory: Some(Memory::spare(class)), class, pool: Rc::clone(self) }
        })
    }

    /// Waits for one, though not for a disk that hangs. Who asks has a bounded number of them.
    pub(crate) async fn get(self: &Rc<Self>, class: Class) -> Buffer {
        self.until(|pool| pool.available(class) || pool.starved(class)).await;
        self.take_or_make(class)
    }

    /// Waits until `enough` holds: it is asked whenever a buffer came back, and at least every `PATIENCE`.
    pub(crate) async fn until(&self, enough: impl Fn(&Self) -> bool) {
        loop {
            let freed = self.freed.notified();
            if enough(self) {
                return;
            }
            drop(tokio::time::timeout(PATIENCE, freed).await);
        }
    }
}

/// One buffer, out of the pool.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Option<Memory>,
    class: Class,
    pool: Rc<Pool>,
}

impl Buffer {
    fn pointer(&self) -> *mut u8 {
        self.memory.as_ref().expect("only drop takes it").start.as_ptr()
    }

    /// The bytes. The caller knows that no leg I/O writes to them now.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is initialized (zeroed at birth), lives as long as the pool, is this buffer's alone, and is written only by the kernel on behalf of
        // a read that the core asked for; the core answers a request, which is when its bytes are looked at, after those reads ended.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.class.bytes()) }
    }

    /// The bytes, while nobody else has the buffer.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` says that no `Rc` of it is shared with an I/O.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.class.bytes()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.give_back(self.class, memory);
        }
    }
}

/// A part of a buffer that one leg I/O uses. It keeps the buffer out of the pool.
#[derive(Debug)]
pub(crate) struct Window {
    buffer: Rc<Buffer>,
    offset: usize,
    len: usize,
}

impl Window {
    pub(crate) fn new(buffer: Rc<Buffer>, offset: usize, len: usize) -> Self {
        assert!(offset + len <= buffer.class.bytes(), "an I/O of {len} bytes at {offset} does not fit {:?}", buffer.class);
        Self { buffer, offset, len }
    }

    /// What its buffer is for.
    pub(crate) fn class(&self) -> Class {
        self.buffer.class
    }

    /// Its bytes. The caller knows that no leg I/O writes to them now.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer.bytes()[self.offset..self.offset + self.len]
    }

    /// Whether the ring knows its memory, as a part of its buffer 0.
    pub(crate) fn registered(&self) -> bool {
        let spare = self.buffer.memory.as_ref().is_some_and(|memory| memory.spare.is_some());
        self.buffer.pool.registered.get() && !spare
    }
}

// SAFETY: the memory neither moves nor is freed while `buffer` is held, and the window lies within it (checked in `new`).
unsafe impl tokio_uring::buf::IoBuf for Window {
    fn stable_ptr(&self) -> *const u8 {
        self.buffer.pointer().wrapping_add(self.offset)
    }
    fn bytes_init(&self) -> usize {
        self.len
    }
    fn bytes_total(&self) -> usize {
        self.len
    }
}

// SAFETY: as above; all of it is initialized from the start.
unsafe impl tokio_uring::buf::IoBufMut for Window {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.buffer.pointer().wrapping_add(self.offset)
    }
    unsafe fn set_init(&mut self, _: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_stays_out_of_the_pool_as_long_as_an_io_holds_it() {
        let pool = Pool::new();
        let all: Vec<Buffer> = std::iter::from_fn(|| pool.take(Class::Copy)).collect();
        assert_eq!(all.len(), Class::Copy.count());
        let mut all = all.into_iter();
        let shared = Rc::new(all.next().unwrap());
        let window = Window::new(Rc::clone(&shared), 4096, 4096);
        drop(shared);
        assert!(!pool.available(Class::Copy));
        drop(window);
        assert!(pool.available(Class::Copy));
    }

    #[test]
    fn rule_32_there_are_as_many_buffers_as_were_allocated_and_no_more() {
        let pool = Pool::new();
        for class in Class::ALL {
            let all: Vec<Buffer> = (0..class.count() * 2).map_while(|_| pool.take(class)).collect();
            assert_eq!(all.len(), class.count(), "{class:?}");
        }
    }

    #[test]
    fn what_late_io_holds_is_replaced_and_the_pool_is_as_large_as_before_when_it_ends() {
        let pool = Pool::new();
        let drain = || std::iter::from_fn(|| pool.take(Class::Large)).collect::<Vec<Buffer>>();
        let mut late = drain();
        assert_eq!(late.len(), Class::Large.count());
        pool.replace(Class::Large, late.len());
        let held = drain();
        assert_eq!(held.len(), late.len());
        // Half of it ends while what replaced it is in use, half while that is free.
        late.drain(..20).for_each(|_| pool.no_longer_late(Class::Large));
        drop(held);
        late.drain(..).for_each(|_| pool.no_longer_late(Class::Large));
        let all = drain();
        assert_eq!(all.len(), Class::Large.count());
        assert!(all.iter().all(|buffer| buffer.memory.as_ref().unwrap().spare.is_none()));
    }

    #[test]
    fn metadata_waits_for_nobodys_memory() {
        let pool = Pool::new();
        let all: Vec<Buffer> = (0..Class::Meta.count() * 2).map(|_| pool.take_or_make(Class::Meta)).collect();
        drop(all);
        let left: Vec<Buffer> = std::iter::from_fn(|| pool.take(Class::Meta)).collect();
        assert_eq!(left.len(), Class::Meta.count());
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_window_beyond_its_buffer_is_refused() {
        let pool = Pool::new();
        Window::new(Rc::new(pool.take(Class::Small).unwrap()), 32 << 10, 4096);
    }
}
