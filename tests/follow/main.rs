//! A session that is read while it is written: the merge of its CPUs, the call
//! flow that comes of it, and the commands that show it.

mod command;
mod examples;
mod growing;
mod live;
mod merge;
mod off;
