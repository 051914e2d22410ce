//! The control plane is real: it answers, refuses, counts, and comes back with what it stored.

use k8s_openapi::api::core::v1::{Namespace, Secret, ServiceAccount};
use kube::Api;
use kube::api::PostParams;
use std::time::Instant;
use support::control_plane::{ControlPlane, shared};
use support::process::output;
use support::tools::Tools;

fn service_account(name: &str) -> ServiceAccount {
    serde_json::from_value(serde_json::json!({"metadata": {"name": name}})).unwrap()
}

#[tokio::test]
async fn kubectl_and_helm_reach_it() {
    let namespaces = output(shared().kubectl().args(["get", "namespaces", "-o", "name"])).unwrap();
    assert!(namespaces.contains("namespace/default") && namespaces.contains("namespace/kube-system"), "{namespaces}");
    let releases = output(shared().helm().args(["list", "-A", "-o", "json"])).unwrap();
    assert_eq!(releases.trim(), "[]");
}

#[tokio::test]
async fn a_service_account_has_a_token_and_no_more_rights_than_it_was_given() {
    let accounts: Api<ServiceAccount> = Api::namespaced(shared().client().await.unwrap(), "default");
    accounts.create(&PostParams::default(), &service_account("nobody")).await.unwrap();
    let token = shared().service_account_token("default", "nobody").await.unwrap();
    let kubeconfig = shared().kubeconfig_for(&token, "nobody").unwrap();
    let who = output(shared().kubectl().env("KUBECONFIG", kubeconfig).args(["auth", "whoami"])).unwrap();
    assert!(who.contains("system:serviceaccount:default:nobody"), "{who}");

    let secrets: Api<Secret> = Api::namespaced(shared().client_for(&token).await.unwrap(), "default");
    let error = secrets.get("a-secret-that-is-refused").await.unwrap_err().to_string();
    assert!(error.contains("cannot get resource \"secrets\""), "{error}");
    let event = shared()
        .audit_events()
        .unwrap()
        .into_iter()
        .find(|event| event["objectRef"]["name"] == "a-secret-that-is-refused")
        .unwrap();
    assert_eq!(event["user"]["username"], "system:serviceaccount:default:nobody");
    assert_eq!(event["responseStatus"]["code"], 403);
}

#[tokio::test]
async fn the_api_server_can_be_stopped_and_started() {
    let started = Instant::now();
    let mut own = ControlPlane::start(&Tools::ensure().unwrap()).await.unwrap();
    eprintln!("ready after {:?}", started.elapsed());
    let namespaces: Api<Namespace> = Api::all(own.client().await.unwrap());
    let namespace = serde_json::from_value(serde_json::json!({"metadata": {"name": "kept"}})).unwrap();
    namespaces.create(&PostParams::default(), &namespace).await.unwrap();

    let stopped = Instant::now();
    own.stop_api_server();
    eprintln!("stopped after {:?}", stopped.elapsed());
    namespaces.get("kept").await.unwrap_err();
    own.start_api_server().await.unwrap();
    namespaces.get("kept").await.unwrap();

    let folder = own.kubeconfig().parent().unwrap().to_owned();
    let dropped = Instant::now();
    drop(own);
    eprintln!("gone after {:?}", dropped.elapsed());
    assert!(!folder.exists(), "the folder is still there");
}
