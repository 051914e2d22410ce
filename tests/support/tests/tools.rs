//! The tools are built, and know which version they are.

use std::process::Command;
use support::process::output;
use support::tools::{self, Tools};

#[test]
fn the_tools_are_those_that_are_pinned() {
    let tools = Tools::ensure().unwrap();
    let kubernetes = std::env::var(tools::KUBERNETES).unwrap_or("1.37".into());
    let etcd = output(Command::new(&tools.etcd).arg("--version")).unwrap();
    assert!(etcd.starts_with("etcd Version: 3.7."), "{etcd}");
    let api_server = output(Command::new(&tools.kube_apiserver).arg("--version")).unwrap();
    assert!(api_server.starts_with(&format!("Kubernetes v{kubernetes}.")), "{api_server}");
    let kubectl = output(Command::new(&tools.kubectl).args(["version", "--client"])).unwrap();
    assert!(kubectl.starts_with(&format!("Client Version: v{kubernetes}.")), "{kubectl}");
    let helm = output(Command::new(&tools.helm).args(["version", "--short"])).unwrap();
    assert!(helm.starts_with("v4.3."), "{helm}");
}
