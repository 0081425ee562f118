//! End-to-end tests: real guests under a real libvirtd.
//!
//! One lab, built and booted by tests/lab, serves all tests of a run; each test
//! has a domain of its own. Nothing here is skipped: where the lab cannot be
//! had, the tests fail. They need root; `make test` runs them.

mod attack;
mod backings;
mod boot;
mod classes;
mod detect;
mod detection_table;
mod distorted;
mod doctor;
mod edges;
mod enrolment;
mod follow;
mod hook;
mod image;
mod integrity;
mod kaslr;
mod keys;
mod lab;
mod lifecycle;
mod modules;
mod patrol;
mod pause;
mod plain;
mod planted;
mod qemu;
mod refusals;
mod rows;
mod soak;
mod switch;
mod symbols;
mod syslog;
mod trace;
mod traced;
mod turns;
mod waits;
mod watch;
