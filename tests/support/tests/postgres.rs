//! PostgreSQL is real: it answers, comes back after a stop and a crash, and never runs as root.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use support::postgres::{Binaries, PostgresOptions, PostgresServer, Shutdown, shared};
use support::process::output;

#[tokio::test]
async fn it_answers_and_every_database_has_its_owner() {
    let (one, other) = (shared().database().await.unwrap(), shared().database().await.unwrap());
    let client = one.client().await.unwrap();
    let row = client.query_one("SELECT 1, current_user::text, current_database()::text", &[]).await.unwrap();
    assert_eq!((row.get(0), row.get(1), row.get(2)), (1, one.user.clone(), one.name.clone()));
    client.batch_execute("CREATE TABLE t (id int)").await.unwrap();
    assert_ne!(one.name, other.name);
    other.client().await.unwrap().batch_execute("CREATE TABLE t (id int)").await.unwrap();
    shared().create_database("by_name").await.unwrap();
    shared().connect("by_name").await.unwrap();
}

#[tokio::test]
async fn it_does_not_run_as_root() {
    let row = shared().connect("postgres").await.unwrap().query_one("SHOW data_directory", &[]).await.unwrap();
    let owner = Path::new(row.get::<_, &str>(0)).metadata().unwrap().uid();
    assert_ne!(owner, 0);
    let pid = shared().pid().unwrap().to_string();
    let uid = output(Command::new("ps").args(["-o", "uid=", "-p", &pid])).unwrap();
    assert_eq!(uid.trim(), owner.to_string());
}

#[tokio::test]
async fn it_comes_back_with_what_was_committed() {
    let settings = vec![("max_connections".into(), "17".into())];
    let mut own = PostgresServer::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
    own.connect("postgres")
        .await
        .unwrap()
        .batch_execute("CREATE TABLE kept (id int); INSERT INTO kept VALUES (7)")
        .await
        .unwrap();
    let port = own.port();
    for how in [Shutdown::Fast, Shutdown::Immediate] {
        own.restart(how).await.unwrap();
        let row = own
            .connect("postgres")
            .await
            .unwrap()
            .query_one("SELECT id, current_setting('max_connections') FROM kept", &[])
            .await
            .unwrap();
        assert_eq!((row.get(0), row.get(1)), (7, "17"));
    }
    own.stop(Shutdown::Fast).unwrap();
    own.connect("postgres").await.map(drop).unwrap_err();
    assert_eq!(own.port(), port);
}

/// Also where the download lies in a folder that only we may enter, while the server runs as another user.
#[tokio::test]
async fn any_major_version_can_be_had() {
    let binaries = Binaries::of_major(18).unwrap();
    let own = PostgresServer::start(PostgresOptions { binaries: Some(binaries), ..Default::default() }).await.unwrap();
    assert!(own.version().starts_with("18."), "{}", own.version());
    let row = own.connect("postgres").await.unwrap().query_one("SHOW server_version_num", &[]).await.unwrap();
    assert!(row.get::<_, &str>(0).starts_with("18"));
}
