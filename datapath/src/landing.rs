//! Where the requests of a thread's volumes land: what they are is known when they are read.

use std::{io::IoSliceMut, rc::Rc};

use crate::{
    abi::fuse::WRITE_HEAD,
    buffers::{Buffer, Class, PAGE, Pool},
};

/// Where a request begins in a large buffer: the payload behind its head is page-aligned.
const START: usize = PAGE - WRITE_HEAD;
const SMALL: usize = Class::Small.bytes();

/// A buffer of each class. A payload that is small as the one before it was, or large as that was, lands where it stays: a small one in the small
/// buffer, a large one behind its head. Another one is copied.
#[derive(Debug, Default)]
pub(crate) struct Landing {
    large: Option<Buffer>,
    small: Option<Buffer>,
    /// The last write was small.
    expects_small: bool,
    /// The last request was read so that a small payload is where it stays.
    scattered: bool,
}

impl Landing {
    /// Takes the buffers that it lacks, as far as there are any.
    pub(crate) fn refill(&mut self, pool: &Rc<Pool>) {
        self.large = self.large.take().or_else(|| pool.take(Class::Large));
        self.small = self.small.take().or_else(|| pool.take(Class::Small));
    }

    /// Has one request read, into these parts one after the other.
    pub(crate) fn fill<T>(&mut self, pool: &Rc<Pool>, read: impl FnOnce(&mut [IoSliceMut<'_>]) -> T) -> T {
        let large = &mut self.large.get_or_insert_with(|| pool.take_or_make(Class::Large)).bytes_mut()[START..];
        self.scattered = self.expects_small;
        if !self.scattered {
            return read(&mut [IoSliceMut::new(large)]);
        }
        let small = self.small.get_or_insert_with(|| pool.take_or_make(Class::Small)).bytes_mut();
        let (head, payload) = large.split_at_mut(WRITE_HEAD);
        read(&mut [IoSliceMut::new(head), IoSliceMut::new(small), IoSliceMut::new(&mut payload[SMALL..])])
    }

    /// The beginning of the request that was read: `WRITE_HEAD` bytes of its `len`.
    pub(crate) fn head(&self, len: usize) -> &[u8] {
        self.large.as_ref().map_or(&[], |large| &large.bytes()[START..][..len.min(WRITE_HEAD)])
    }

    /// The payload of the write that was read, of so many bytes: its buffer, and where it begins there.
    pub(crate) fn payload(&mut self, pool: &Rc<Pool>, bytes: usize) -> (Buffer, usize) {
        let mut large = self.large.take().unwrap_or_else(|| pool.take_or_make(Class::Large));
        let mut small = self.small.take().unwrap_or_else(|| pool.take_or_make(Class::Small));
        self.expects_small = Class::of_payload(bytes) == Class::Small;
        if self.expects_small {
            if !self.scattered {
                small.bytes_mut()[..bytes].copy_from_slice(&large.bytes()[PAGE..][..bytes]);
            }
            self.large = Some(large);
            return (small, 0);
        }
        if self.scattered {
            large.bytes_mut()[PAGE..][..SMALL].copy_from_slice(small.bytes());
        }
        self.small = Some(small);
        (large, PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel does it.
    fn scatter(request: &[u8], parts: &mut [IoSliceMut<'_>]) -> usize {
        assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), WRITE_HEAD + (1 << 20), "the kernel refuses less");
        let mut rest = request;
        for part in parts {
            let (here, more) = rest.split_at(rest.len().min(part.len()));
            part[..here.len()].copy_from_slice(here);
            rest = more;
        }
        request.len()
    }

    #[test]
    fn a_payload_is_whole_whatever_size_the_one_before_it_had() {
        let (pool, mut landing) = (Pool::new(), Landing::default());
        let sizes = [4096, SMALL, SMALL + 4096, 1 << 20];
        let mut random = fastrand::Rng::with_seed(1);
        for (first, second) in sizes.iter().flat_map(|first| sizes.map(|second| (*first, second))) {
            for size in [first, second] {
                let request: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(WRITE_HEAD + size).collect();
                landing.refill(&pool);
                let len = landing.fill(&pool, |parts| scatter(&request, parts));
                let (head, payload) = request.split_at(WRITE_HEAD);
                assert_eq!(landing.head(len), head);
                let (buffer, start) = landing.payload(&pool, size);
                assert!(buffer.bytes()[start..][..size] == *payload, "{size} bytes, {first} and {second}");
                assert!(buffer.bytes()[start..].as_ptr().addr().is_multiple_of(PAGE), "direct I/O wants pages");
            }
        }
    }

    #[test]
    fn what_has_no_payload_takes_no_buffer_and_a_pool_that_is_empty_none_that_is_needed() {
        let (pool, mut landing) = (Pool::new(), Landing::default());
        let all: Vec<Buffer> = [Class::Small, Class::Large]
            .map(|class| std::iter::from_fn(|| pool.take(class)).collect())
            .into_iter()
            .flat_map(|all: Vec<_>| all)
            .collect();
        for (size, head) in [(4096, 3), (0, 4), (4096, 5), (1 << 20, 6)] {
            landing.refill(&pool);
            let request = vec![head; WRITE_HEAD + size];
            let len = landing.fill(&pool, |parts| scatter(&request, parts));
            assert_eq!(landing.head(len), [head; WRITE_HEAD]);
            if size > 0 {
                let (buffer, start) = landing.payload(&pool, size);
                assert_eq!(buffer.bytes()[start..][..size], request[WRITE_HEAD..]);
            }
        }
        drop(all);
    }
}
