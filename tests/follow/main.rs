//! A session that is read while it is written: the merge of its CPUs, the call
//! flow that comes of it, and the command that shows it.

mod command;
mod growing;
mod live;
mod merge;
