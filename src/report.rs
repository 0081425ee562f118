//! From a session on disk to its `trace_graph.txt`.

use std::io::{self, BufWriter};
use std::path::Path;

use crate::output::{self, Format};
use crate::session::{Session, SessionError, GRAPH_FILE};

/// Why there is no call flow.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The session could not be opened.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Its records could not be read, or the report not written.
    #[error(transparent)]
    Report(#[from] output::ReportError<SessionError>),
    /// The file could not be put in its place.
    #[error("cannot write the call flow")]
    Write(#[from] io::Error),
}

/// Writes a session's `trace_graph.txt` into its directory, in place of what was there
/// or not at all. Of a trace whose calls take more than `limit` bytes it is the
/// beginning: returns whether it is all.
///
/// # Errors
/// See [`ReportError`].
pub fn write_graph(dir: &Path, limit: u64) -> Result<bool, ReportError> {
    let session = Session::open(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    let out = BufWriter::with_capacity(1 << 18, &mut file);
    let whole = Format::graph(&session, out, limit)?;
    file.persist(dir.join(GRAPH_FILE))
        .map_err(|error| error.error)?;
    Ok(whole)
}
