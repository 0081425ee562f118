//! (to be written)

mod address;

pub use address::Gva;
