//! Chunks of ring buffer on disk, a file for each CPU and boot.
//!
//! After 8 bytes that say what the file is, one frame follows the other: a
//! header of 32 bytes, then the chunk's bytes. All numbers are little-endian.
//!
//! ```text
//!  0  u32  "XFCH"
//!  4  u32  length of the bytes
//!  8  u64  time stamp of the page, guest trace clock, ns
//! 16  u32  where on the page the bytes begin
//! 20  u8   what is in front: 0 nothing is missing, 1 torn, 2 no helper, 3 not stored,
//!          4 overrun; 5: these bytes are older than the trace
//! 21  3    0
//! 24  u64  when it was read, host wall clock, ns since 1970; 0 where that is not known
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::ring::{Chunk, Gap};

use super::SessionError;

const FILE_MAGIC: &[u8; 8] = b"XFRING1\n";
const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"XFCH");
const HEADER: usize = 32;
/// A sub-buffer is at most this long.
const BYTES_LIMIT: u32 = 65536;

/// A chunk as it lies in its file.
#[derive(Debug)]
pub struct Frame {
    cpu: u16,
    bytes: Vec<u8>,
}

impl Frame {
    /// That of a chunk that was read at `wall_ns`.
    pub fn of(chunk: &Chunk, wall_ns: u64) -> Self {
        let mut bytes = vec![0; HEADER];
        let fields: [(usize, &[u8]); 5] = [
            (0, &FRAME_MAGIC.to_le_bytes()),
            (4, &(chunk.bytes.len() as u32).to_le_bytes()),
            (8, &chunk.page_time.to_le_bytes()),
            (16, &chunk.offset.to_le_bytes()),
            (24, &wall_ns.to_le_bytes()),
        ];
        for (at, field) in fields {
            bytes[at..at + field.len()].copy_from_slice(field);
        }
        bytes.extend(&chunk.bytes);
        let mut frame = Self {
            cpu: chunk.cpu,
            bytes,
        };
        if let Some(gap) = chunk.gap {
            frame.mark(gap);
        }
        frame
    }

    /// Has it say what is in front of it.
    pub fn mark(&mut self, gap: Gap) {
        self.bytes[20] = match gap {
            Gap::Torn => 1,
            Gap::HelperAbsent => 2,
            Gap::NotStored => 3,
            Gap::Overrun => 4,
            Gap::Earlier => 5,
        };
    }

    /// Whose it is.
    pub fn cpu(&self) -> u16 {
        self.cpu
    }

    /// How much a file grows by it, bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// Appends chunks of one CPU to its file.
#[derive(Debug)]
pub struct ChunkWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl ChunkWriter {
    /// Opens the file of `cpu` in boot number `boot` below `dir`, and makes it
    /// where it is not there. A frame that a crash left unfinished is cut off.
    ///
    /// # Errors
    /// If the file cannot be made, or is something else.
    pub fn open(dir: &Path, boot: u32, cpu: u16) -> Result<Self, SessionError> {
        let path = path(dir, boot, cpu);
        let io = |action| SessionError::io(action, &path);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open"))?;
        if file.metadata().map_err(io("read"))?.len() < FILE_MAGIC.len() as u64 {
            file.set_len(0).map_err(io("write"))?;
            file.write_all(FILE_MAGIC).map_err(io("write"))?;
        } else {
            let mut reader = ChunkReader::open_path(&path, cpu)?;
            while reader.next_chunk()?.is_some() {}
            file.set_len(reader.good).map_err(io("mend"))?;
            file.seek(SeekFrom::End(0)).map_err(io("write"))?;
        }
        Ok(Self {
            file: BufWriter::with_capacity(1 << 18, file),
            path,
        })
    }

    /// Appends a chunk.
    ///
    /// # Errors
    /// If there is no place for it, which takes writing what came before it (on a full
    /// disk, say).
    pub fn append(&mut self, frame: &Frame) -> Result<(), SessionError> {
        self.file
            .write_all(&frame.bytes)
            .map_err(SessionError::io("write", &self.path))
    }

    /// Leaves it at what was handed to the operating system, and gives how much was not,
    /// bytes.
    pub fn give_up(self) -> u64 {
        // Dropped as it is, it would try once more.
        let (_, left) = self.file.into_parts();
        left.map_or(0, |left| left.len() as u64)
    }

    /// Hands what is buffered to the operating system.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn flush(&mut self) -> Result<(), SessionError> {
        self.file
            .flush()
            .map_err(SessionError::io("write", &self.path))
    }
}

/// Reads the chunks of one CPU.
#[derive(Debug)]
pub struct ChunkReader {
    file: BufReader<File>,
    path: PathBuf,
    cpu: u16,
    /// How many bytes from the start are whole frames.
    good: u64,
    /// How many bytes of the file are read.
    end: u64,
}

/// How long the file of `cpu` in boot number `boot` below `dir` is by now, bytes;
/// 0 where there is none.
pub(super) fn length(dir: &Path, boot: u32, cpu: u16) -> u64 {
    fs::metadata(path(dir, boot, cpu)).map_or(0, |file| file.len())
}

impl ChunkReader {
    /// Opens the file of `cpu` in boot number `boot` below `dir`; `None` where
    /// that CPU left nothing.
    ///
    /// # Errors
    /// If the file cannot be read, or is something else.
    pub fn open(dir: &Path, boot: u32, cpu: u16) -> Result<Option<Self>, SessionError> {
        match Self::open_path(&path(dir, boot, cpu), cpu) {
            Ok(reader) => Ok(Some(reader)),
            Err(SessionError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// As [`ChunkReader::open`], but `None` also where the file was just made
    /// and does not yet say what it is.
    ///
    /// # Errors
    /// If the file cannot be read, or is something else.
    pub fn open_growing(dir: &Path, boot: u32, cpu: u16) -> Result<Option<Self>, SessionError> {
        let just_made = fs::metadata(path(dir, boot, cpu))
            .is_ok_and(|file| file.len() < FILE_MAGIC.len() as u64);
        if just_made {
            return Ok(None);
        }
        Self::open(dir, boot, cpu)
    }

    /// As [`ChunkReader::open`], but what comes behind the first `end` bytes of the
    /// file is not read.
    ///
    /// # Errors
    /// If the file cannot be read, or is something else.
    pub(super) fn open_up_to(
        dir: &Path,
        boot: u32,
        cpu: u16,
        end: u64,
    ) -> Result<Option<Self>, SessionError> {
        if end < FILE_MAGIC.len() as u64 {
            return Ok(None);
        }
        let opened = Self::open(dir, boot, cpu)?;
        Ok(opened.map(|reader| Self { end, ..reader }))
    }

    fn open_path(path: &Path, cpu: u16) -> Result<Self, SessionError> {
        let mut file = BufReader::with_capacity(
            1 << 16,
            File::open(path).map_err(SessionError::io("open", path))?,
        );
        let mut magic = [0; 8];
        match file.read_exact(&mut magic) {
            Ok(()) if magic == *FILE_MAGIC => {}
            Ok(()) => return Err(SessionError::NotChunks(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(SessionError::NotChunks(path.to_owned()));
            }
            Err(error) => return Err(SessionError::io("read", path)(error)),
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            cpu,
            good: FILE_MAGIC.len() as u64,
            end: u64::MAX,
        })
    }

    /// The next chunk; `None` at the end of the file, or at a frame that is
    /// not whole. Where the file has grown since, the next call goes on.
    ///
    /// # Errors
    /// If the file cannot be read, or something else follows the last frame.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk>, SessionError> {
        let chunk = self.frame()?;
        if chunk.is_none() {
            self.file
                .seek(SeekFrom::Start(self.good))
                .map_err(SessionError::io("read", &self.path))?;
        }
        Ok(chunk)
    }

    fn frame(&mut self) -> Result<Option<Chunk>, SessionError> {
        let mut header = [0u8; HEADER];
        if !self.fill(&mut header)? {
            return Ok(None);
        }
        let u32_at = |at: usize| {
            header
                .get(at..)
                .and_then(|h| h.first_chunk().copied())
                .map_or(0, u32::from_le_bytes)
        };
        let length = u32_at(4);
        if u32_at(0) != FRAME_MAGIC || length > BYTES_LIMIT {
            return Err(SessionError::NotChunks(self.path.clone()));
        }
        let page_time = u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32;
        let gap = match header[20] {
            1 => Some(Gap::Torn),
            2 => Some(Gap::HelperAbsent),
            3 => Some(Gap::NotStored),
            4 => Some(Gap::Overrun),
            5 => Some(Gap::Earlier),
            _ => None,
        };
        if self.end.saturating_sub(self.good) < HEADER as u64 + u64::from(length) {
            return Ok(None);
        }
        let mut bytes = vec![0; length as usize];
        if !self.fill(&mut bytes)? {
            return Ok(None);
        }
        self.good += (HEADER + bytes.len()) as u64;
        Ok(Some(Chunk {
            cpu: self.cpu,
            page_time,
            offset: u32_at(16),
            bytes,
            gap,
        }))
    }

    /// Fills `bytes`; `false` where the file ends before.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<bool, SessionError> {
        match self.file.read_exact(bytes) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(SessionError::io("read", &self.path)(error)),
        }
    }
}

fn path(dir: &Path, boot: u32, cpu: u16) -> PathBuf {
    dir.join("ring").join(format!("boot{boot}-cpu{cpu}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(page_time: u64, offset: u32, length: usize, gap: Option<Gap>) -> Chunk {
        Chunk {
            cpu: 3,
            page_time,
            offset,
            bytes: vec![length as u8; length],
            gap,
        }
    }

    fn all(dir: &Path) -> Vec<Chunk> {
        let mut reader = ChunkReader::open(dir, 1, 3)
            .expect("a file")
            .expect("a file");
        let mut chunks = Vec::new();
        while let Some(chunk) = reader.next_chunk().expect("a chunk") {
            chunks.push(chunk);
        }
        chunks
    }

    fn dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("ring")).expect("a directory");
        dir
    }

    #[test]
    fn what_is_written_is_read_and_gone_on_with() {
        let dir = dir();
        let chunks = [
            chunk(7, 0, 40, None),
            chunk(7, 40, 4040, Some(Gap::Torn)),
            chunk(9, 0, 0, Some(Gap::HelperAbsent)),
            chunk(u64::MAX, 4, 1, Some(Gap::NotStored)),
            chunk(10, 0, 2, Some(Gap::Overrun)),
            chunk(11, 0, 3, Some(Gap::Earlier)),
        ];
        for part in chunks.chunks(2) {
            let mut writer = ChunkWriter::open(dir.path(), 1, 3).expect("a writer");
            for chunk in part {
                writer.append(&Frame::of(chunk, 5)).expect("a chunk");
            }
            writer.flush().expect("a flush");
        }
        assert_eq!(all(dir.path()), chunks);
    }

    #[test]
    fn a_frame_cut_by_a_crash_is_left_out_and_gone_over() {
        let dir = dir();
        let (first, second) = (chunk(7, 0, 40, None), chunk(8, 0, 16, None));
        for chunk in [&first, &second] {
            let mut writer = ChunkWriter::open(dir.path(), 1, 3).expect("a writer");
            writer.append(&Frame::of(chunk, 5)).expect("a chunk");
            writer.flush().expect("a flush");
        }
        let path = path(dir.path(), 1, 3);
        let whole = fs::read(&path).expect("the file");
        for cut in 1..HEADER + 16 {
            fs::write(&path, &whole[..whole.len() - cut]).expect("a cut file");
            assert_eq!(all(dir.path()), std::slice::from_ref(&first));
        }
        let mut writer = ChunkWriter::open(dir.path(), 1, 3).expect("a writer");
        writer.append(&Frame::of(&second, 5)).expect("a chunk");
        writer.flush().expect("a flush");
        assert_eq!(fs::read(&path).expect("the file"), whole);
    }

    #[test]
    fn a_reader_goes_on_when_the_file_has_grown() {
        let dir = dir();
        let (first, second) = (chunk(7, 0, 40, None), chunk(8, 0, 16, None));
        let mut writer = ChunkWriter::open(dir.path(), 1, 3).expect("a writer");
        writer.append(&Frame::of(&first, 5)).expect("a chunk");
        writer.append(&Frame::of(&second, 5)).expect("a chunk");
        writer.flush().expect("a flush");
        let path = path(dir.path(), 1, 3);
        let whole = fs::read(&path).expect("the file");
        let before = whole.len() - HEADER - 16;
        fs::write(&path, &whole[..before]).expect("one frame");
        let mut reader = ChunkReader::open(dir.path(), 1, 3)
            .expect("a file")
            .expect("a file");
        assert_eq!(reader.next_chunk().expect("a chunk"), Some(first));
        for length in before..whole.len() {
            fs::write(&path, &whole[..length]).expect("a cut file");
            assert_eq!(reader.next_chunk().expect("no chunk yet"), None);
        }
        fs::write(&path, &whole).expect("the file");
        assert_eq!(reader.next_chunk().expect("a chunk"), Some(second));
    }

    #[test]
    fn a_cpu_without_a_file_left_nothing() {
        assert!(ChunkReader::open(dir().path(), 1, 3)
            .expect("no file")
            .is_none());
    }

    #[test]
    fn what_is_no_file_of_chunks_is_refused() {
        let dir = dir();
        for bytes in [
            &b"short"[..],
            b"XFRING2\n",
            b"XFRING1\nnot a frame, and long enough to be one",
        ] {
            fs::write(path(dir.path(), 1, 3), bytes).expect("a file");
            let opened = ChunkReader::open(dir.path(), 1, 3);
            let refused = match opened {
                Err(SessionError::NotChunks(_)) => true,
                Ok(Some(mut reader)) => {
                    matches!(reader.next_chunk(), Err(SessionError::NotChunks(_)))
                }
                _ => false,
            };
            assert!(refused, "{bytes:?}");
        }
    }
}
