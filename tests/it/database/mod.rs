//! The suite for the sweep on a real server; `cargo xtask test --postgres MAJOR` runs it on any version.

mod bouncer;
mod edges;
mod faults;
mod history;
mod poison;
mod preflight;
mod shapes;
mod sweep;
