//! How to reach a PostgreSQL server: `target` reads the connection `uri` and the `tls` files, `session` opens the
//! connection and sends statements, `error` classifies what went wrong.

pub mod error;
pub mod session;
pub mod target;
pub mod tls;
mod uri;

pub use error::Error;
pub use session::Session;
pub use target::Target;
