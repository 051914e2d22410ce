//! How to reach a PostgreSQL server: `target` reads the connection `uri` and the `tls` files, `session` opens the
//! connection and sends statements, `bounded` limits what the server may send, `error` classifies what went wrong.

mod bounded;
pub mod error;
pub mod session;
pub mod target;
pub mod tls;
mod uri;

pub use error::Error;
pub use session::Session;
pub use target::Target;
