//! The suite for the sweep on a real server; `cargo xtask test --postgres MAJOR` runs it on any version.

mod bouncer;
mod connections;
mod counts;
mod edges;
mod faults;
mod history;
mod plans;
mod poison;
mod preflight;
mod shapes;
mod silence;
mod sweep;
mod times;
