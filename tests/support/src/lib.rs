//! The real parts that the tests and the demo run on: they are found or built once, started on loopback, and never outlive us.

pub mod bouncer;
pub mod build;
pub mod cache;
pub mod certificates;
pub mod control_plane;
pub mod json;
pub mod leaks;
pub mod postgres;
pub mod process;
pub mod progress;
pub mod prometheus;
pub mod scratch;
pub mod tools;
pub mod wait;

use std::future::Future;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::OnceLock;
use std::thread;
use tokio::runtime::Builder;

/// A port of the loopback interface that nobody listens on now. Somebody else may take it before we do: starts are tried again.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Something that no one can guess and no one else has: for tokens, passwords and names.
pub fn random_hex() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// What the tests of one process share. It is started on a thread and a runtime of its own, since the runtime of the test that asks
/// first ends with that test; and a failed start is told to every test, not tried again by each.
pub(crate) fn start_once<T, F>(cell: &'static OnceLock<Result<T, String>>, start: fn() -> F) -> &'static T
where
    T: Send + Sync,
    F: Future<Output = anyhow::Result<T>> + 'static,
{
    let started = cell.get_or_init(|| {
        let run =
            move || -> anyhow::Result<T> { Builder::new_current_thread().enable_all().build()?.block_on(start()) };
        let thread = thread::spawn(move || run().map_err(|error| format!("{error:#}")));
        thread.join().unwrap_or_else(|_| Err("the start panicked".to_owned()))
    });
    started.as_ref().unwrap_or_else(|error| panic!("{error}"))
}
