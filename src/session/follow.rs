//! Follows a session while its helper writes it.
//!
//! A report can merge the CPUs by time because every file is there to its end.
//! Here a file that has no more now may have more at any moment: what is read waits
//! until it has [settled](super::settle).
//!
//! A file of which more is there than is held ([`HELD`]) is not read on until
//! there is room: whoever follows may fall behind, and costs memory for no more
//! than that. Items that are newer than the last one held of such a file wait
//! for what comes next in it.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::keys::KlogReader;
use crate::ring::record::Item;
use crate::ring::Decoder;

use super::settle::Settling;
use super::store::ChunkReader;
use super::{Boot, GuestCode, Meta, Session, SessionError, State, KLOG_FILE};

/// How many items are held for all CPUs together. Each may pass this by what is
/// in one chunk.
pub const HELD: usize = 1 << 19;

/// What a look at the session came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Nothing more can be given now.
    Waiting,
    /// There is more; look again at once.
    More,
    /// The session is closed and all of it was given.
    Ended,
}

/// A session that is followed.
#[derive(Debug)]
pub struct Follow<'a> {
    session: &'a Session,
    meta: Meta,
    keys: KlogReader,
    /// How many items may be held.
    room: usize,
    /// Nobody writes the session any more, closed or not.
    left: bool,
    /// Which of the boots is being read.
    boot: usize,
    /// By CPU.
    streams: BTreeMap<u16, Stream>,
    /// What was read of it.
    items: Settling,
}

/// The file of one CPU.
#[derive(Debug)]
struct Stream {
    chunks: ChunkReader,
    decoder: Decoder,
    /// There may be more in the file than is held.
    more: bool,
}

impl<'a> Follow<'a> {
    /// Follows `session` from its beginning.
    ///
    /// # Errors
    /// If its keys cannot be read.
    pub fn new(session: &'a Session) -> Result<Self, SessionError> {
        Ok(Self {
            session,
            meta: session.meta.clone(),
            keys: KlogReader::open(&session.dir().join(KLOG_FILE))?,
            room: HELD,
            left: false,
            boot: 0,
            streams: BTreeMap::new(),
            items: Settling::default(),
        })
    }

    /// The same, with another limit than [`HELD`] for the items that are held.
    #[must_use]
    pub fn holding(self, items: usize) -> Self {
        Self {
            room: items,
            ..self
        }
    }

    /// How many items are held now.
    pub fn held(&self) -> usize {
        self.items.held()
    }

    /// What the session says of itself now. Items of a boot are given only
    /// after it was seen here.
    ///
    /// # Errors
    /// If its `session.json` cannot be read.
    pub fn refresh(&mut self) -> Result<&Meta, SessionError> {
        // Before the files: if it says that they are complete, they are.
        self.meta = Meta::load(self.session.dir())?;
        Ok(&self.meta)
    }

    /// Nobody writes the session any more, though it is not closed: what is in
    /// its files is all there is.
    pub fn leave(&mut self) {
        self.left = true;
    }

    /// Reads what has come, and gives the items that have settled, in the order
    /// of their times. `now` is the moment of the look.
    ///
    /// # Errors
    /// If a file of the session cannot be read.
    pub fn look(
        &mut self,
        now: Instant,
        give: &mut impl FnMut(Item),
    ) -> Result<Look, SessionError> {
        let closed = self.left || self.meta.state == State::Closed;
        let Some(boot) = self.meta.boots.get(self.boot).cloned() else {
            return Ok(if closed { Look::Ended } else { Look::Waiting });
        };
        let complete = closed || self.boot + 1 < self.meta.boots.len();
        self.open_streams(&boot)?;
        self.read(&boot)?;
        self.items.mark(now);
        let given = self.items.give(complete, give);

        let more = self.streams.values().any(|stream| stream.more);
        if more || !complete {
            // Where nothing could go, time has to pass first.
            return Ok(if more && given > 0 {
                Look::More
            } else {
                Look::Waiting
            });
        }
        self.boot += 1;
        self.streams.clear();
        self.items = Settling::default();
        Ok(if self.boot < self.meta.boots.len() {
            Look::More
        } else if closed {
            Look::Ended
        } else {
            Look::Waiting
        })
    }

    /// A CPU's file is there from its first record on.
    fn open_streams(&mut self, boot: &Boot) -> Result<(), SessionError> {
        for cpu in 0..boot.nr_cpus.min(u32::from(u16::MAX)) as u16 {
            if self.streams.contains_key(&cpu) {
                continue;
            }
            if let Some(chunks) = ChunkReader::open_growing(self.session.dir(), boot.number, cpu)? {
                let stream = Stream {
                    chunks,
                    decoder: Decoder::new(boot.types, boot.number),
                    more: false,
                };
                self.streams.insert(cpu, stream);
            }
        }
        Ok(())
    }

    /// Reads each file on, as far as there is room. Half of it is for whoever
    /// comes first, since one CPU may have all the work; of the other half each
    /// CPU has its share, so that none has to wait for another to give way.
    fn read(&mut self, boot: &Boot) -> Result<(), SessionError> {
        let half = self.room / 2;
        let share = (half / boot.nr_cpus.max(1) as usize).max(1);
        let code = GuestCode {
            symbols: self.session.symbols(boot)?,
            slide: boot.slide,
        };
        let items = &mut self.items;
        for (&cpu, stream) in &mut self.streams {
            stream.more = true;
            while items.held_of(cpu) < share || items.held() < half {
                let Some(chunk) = stream.chunks.next_chunk()? else {
                    stream.more = false;
                    break;
                };
                // After the chunk: a key is on disk before the guest has it, so
                // what is in the chunk has its key there by now.
                self.keys.read_on()?;
                let keys = self.keys.keys();
                stream
                    .decoder
                    .chunk(&chunk, keys, &code, &mut |item| items.push(item));
            }
            items.expect_more(cpu, stream.more);
        }
        Ok(())
    }
}
