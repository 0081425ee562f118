//! What is told of an error: its text and that of each cause, once.

use std::io;
use std::path::{Path, PathBuf};

use xftrace::follow::FollowError;
use xftrace::kernel::{Symbols, SymbolsError, SymbolsFault};
use xftrace::output;
use xftrace::ram::RamError;
use xftrace::report::ReportError;
use xftrace::session::SessionError;
use xftrace::symfiles::{Fault, IndexFault, SymfileError};

/// As the commands and the helper print it.
fn told(error: impl std::error::Error + Send + Sync + 'static) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

#[test]
fn each_cause_is_told_once() {
    let full = || io::Error::from_raw_os_error(28);
    let path = || PathBuf::from("/ram/1");
    let io = |error: String| (error, "No space left on device");
    let ram = || RamError::Io {
        path: path(),
        doing: "open",
        source: full(),
    };
    let symbols = || SymbolsError::Io {
        path: path(),
        source: full(),
    };
    let session = || SessionError::Io {
        action: "write",
        path: path(),
        cause: full(),
    };
    let written = || output::ReportError::<SessionError>::Write(full());
    let table = xftrace::kernel::TableFault::Cut;
    let cases = [
        io(told(ram())),
        io(told(symbols())),
        io(told(session())),
        io(told(SessionError::from(symbols()))),
        io(told(written())),
        io(told(ReportError::from(written()))),
        io(told(ReportError::from(full()))),
        io(told(FollowError::from(full()))),
        io(told(SymfileError::Io {
            action: "read",
            path: path(),
            why: full(),
        })),
        (
            told(SymbolsError::Content {
                path: path(),
                fault: SymbolsFault::Empty,
            }),
            "it is empty",
        ),
        (
            told(SymfileError::Content {
                path: path(),
                fault: Fault::from(IndexFault::from(table.clone())),
            }),
            "it is cut short",
        ),
        (told(IndexFault::from(table)), "it is cut short"),
    ];
    for (text, cause) in cases {
        assert_eq!(text.matches(cause).count(), 1, "{text}");
    }
}

#[test]
fn a_file_that_is_not_there_is_told_with_its_name() {
    let error = Symbols::load(Path::new("/nonexistent/map")).expect_err("nothing");
    let text = told(error);
    assert!(text.contains("/nonexistent/map"), "{text}");
    assert!(text.contains("No such file"), "{text}");
}
