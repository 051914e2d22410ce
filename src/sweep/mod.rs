//! The sweep: everything that the database sees. Knows nothing of Kubernetes.
//!
//! `plan` turns a spec into quoted SQL parts, `connection` opens the one connection of a sweep by what `uri` and `tls`
//! read, `statement` writes the SQL, `run` drives the batches at the `pace` that the server allows, with `courtesy` to others who write to it, `error` judges what
//! went wrong, `report` is what comes out. Every batch is its own short transaction: what is done stays done, and is
//! counted, even when a later batch fails.

pub mod connection;
pub mod courtesy;
pub mod error;
pub mod pace;
pub mod plan;
pub mod preflight;
pub mod report;
pub mod run;
pub mod statement;
pub mod tls;
mod uri;

pub use connection::Target;
pub use error::{Class, Error};
pub use plan::Plan;
pub use report::Report;
pub use run::{Connected, Job, connect, go_on, sweep};
