//! One layer of compression taken off, whichever of the usual ones it is.
//!
//! What is unpacked may be a guest's own file. So nothing here trusts a length
//! that the data claims: output ends at a limit of the caller's, and the
//! memory that a decoder may take for its window is limited too.

use std::io::{self, Cursor, Read};

/// The most memory that a decoder's window may take, in KiB. A kernel's is of
/// at most 128 MiB (`zstd -22 --ultra`, scripts/Makefile.lib).
const WINDOW_KB: u32 = 256 << 10;

/// A window of 96 MiB as zstd's frame header has it: 2^(10 + 16) bytes and 4
/// eighths more (RFC 8878, 3.1.1.1.2).
const ZSTD_WINDOW: u8 = 16 << 3 | 4;

/// The largest block of lz4's legacy format, unpacked (lib/decompress_unlz4.c).
const LZ4_BLOCK: usize = 8 << 20;

/// The compressions that kernels and packages come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Xz,
    Lzma,
    Bzip2,
    /// The legacy format of `lz4 -l`, the only one that kernels come in.
    Lz4,
    Zstd,
}

impl Compression {
    /// The compression of data that begins like this.
    pub(super) fn of(head: &[u8]) -> Option<Self> {
        // Those that the kernel's own table has, lib/decompress.c.
        Some(match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x5d, 0, 0, ..] => Self::Lzma,
            [b'B', b'Z', b'h', ..] => Self::Bzip2,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => return None,
        })
    }

    /// Unpacks `packed`, ignoring what comes after the compressed data: a
    /// kernel's payload ends with four bytes of size.
    ///
    /// # Errors
    /// If it is damaged, or more than `limit` bytes come out.
    pub(super) fn unpack(self, packed: &[u8], limit: u64) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        let reader = self.reader(packed, limit)?;
        let got = reader.take(limit.saturating_add(1)).read_to_end(&mut all)?;
        if got as u64 > limit {
            return Err(too_large(limit));
        }
        Ok(all)
    }

    /// Unpacks as it is read. The caller bounds how much; `limit` is for the
    /// one format that is unpacked at once.
    pub(super) fn reader<'a>(
        self,
        packed: impl Read + 'a,
        limit: u64,
    ) -> io::Result<Box<dyn Read + 'a>> {
        let failed = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
        Ok(match self {
            Self::Gzip => Box::new(flate2::read::GzDecoder::new(packed)),
            Self::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
                packed, false, WINDOW_KB,
            )),
            Self::Lzma => Box::new(
                lzma_rust2::LzmaReader::new_mem_limit(packed, WINDOW_KB, None)
                    .map_err(|error| failed(error.to_string()))?,
            ),
            Self::Bzip2 => Box::new(bzip2::read::BzDecoder::new(packed)),
            Self::Lz4 => Box::new(Cursor::new(unpack_lz4(packed, limit)?)),
            Self::Zstd => Box::new(
                ruzstd::decoding::StreamingDecoder::new(smaller_window(packed)?)
                    .map_err(|error| failed(error.to_string()))?,
            ),
        })
    }
}

fn too_large(limit: u64) -> io::Error {
    let text = format!("more than {} MiB come out of it", limit >> 20);
    io::Error::new(io::ErrorKind::FileTooLarge, text)
}

/// The decoder refuses windows of more than 100 MiB, and kernels are packed
/// with 128 MiB, whatever their size. The window only says how far back the
/// data may refer; where it refers less far, which is so for whatever is
/// smaller than the window, a smaller one will do. Where it does not, decoding
/// fails.
fn smaller_window<'a>(mut packed: impl Read + 'a) -> io::Result<impl Read + 'a> {
    /// Bit 5 of the descriptor: no window, the frame's size stands for it.
    const SINGLE_SEGMENT: u8 = 1 << 5;
    // Magic, frame header descriptor, window descriptor.
    let mut head = [0; 6];
    packed.read_exact(&mut head)?;
    let [.., descriptor, window] = &mut head;
    if *descriptor & SINGLE_SEGMENT == 0 {
        *window = ZSTD_WINDOW.min(*window);
    }
    Ok(Cursor::new(head).chain(packed))
}

/// The legacy format: a magic number, then blocks, each with its packed size.
fn unpack_lz4(mut packed: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut word = [0; 4];
    packed.read_exact(&mut word)?;
    let mut all = Vec::new();
    let mut block = Vec::new();
    let mut out = vec![0; LZ4_BLOCK];
    loop {
        block.clear();
        if packed.read_exact(&mut word).is_err() {
            return Ok(all);
        }
        let size = u64::from(u32::from_le_bytes(word));
        packed
            .by_ref()
            .take(size.min(2 * LZ4_BLOCK as u64))
            .read_to_end(&mut block)?;
        // The size that the kernel's build appends looks like a block's.
        if block.is_empty() {
            return Ok(all);
        }
        if block.len() as u64 != size {
            let text = "the last block is cut short";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        let len = lz4_flex::block::decompress_into(&block, &mut out)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        all.extend_from_slice(out.get(..len).unwrap_or_default());
        if all.len() as u64 > limit {
            return Err(too_large(limit));
        }
    }
}
