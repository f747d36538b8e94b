//! The test bed itself: real nodes start, die and come back; the proxy is as
//! bad as it is told to be.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::{Duration, Instant};

use support::{
    Direction, Kafka, NodeOptions, Rabbit, RabbitVersion, TcpProxy, need, shared_kafka,
    shared_rabbit, wait,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const SOON: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_rabbitmq_node_survives_kill_and_pause_and_keeps_its_data() {
    for version in RabbitVersion::ALL {
        let mut rabbit = need!(Rabbit::start(version).await);
        let first_pid = rabbit.pid();
        rabbit.ctl(&["add_vhost", "kept"]).await;

        rabbit.pause().await;
        assert_eq!(rabbit.state().await, "paused");
        rabbit.resume().await;
        rabbit.wait_ready().await;

        rabbit.kill().await;
        assert_eq!(rabbit.state().await, "stopped");
        assert!(
            TcpStream::connect(("127.0.0.1", rabbit.port()))
                .await
                .is_err()
        );

        let port = rabbit.port();
        rabbit.restart().await;
        assert_eq!(rabbit.port(), port);
        assert_ne!(rabbit.pid(), first_pid);
        assert!(
            rabbit.ctl(&["list_vhosts"]).await.contains("kept"),
            "{version:?}"
        );
        assert!(
            rabbit
                .ctl(&["authenticate_user", "helixagent", "helixagent123"])
                .await
                .contains("Success")
        );
    }
}

#[tokio::test]
async fn a_kafka_node_survives_kill_and_keeps_its_data() {
    let mut kafka = need!(Kafka::start_with(NodeOptions::secure()).await);
    let topics = "org.apache.kafka.tools.TopicCommand";
    kafka
        .ctl(&[
            topics,
            "--create",
            "--topic",
            "kept",
            "--config",
            "max.message.bytes=10485760",
        ])
        .await;
    kafka.kill().await;
    assert_eq!(kafka.state().await, "stopped");
    kafka.restart().await;
    assert!(kafka.ctl(&[topics, "--list"]).await.contains("kept"));
    assert!(kafka.tls_file("client.pem").exists());
    for port in [
        kafka.info().tls_port,
        kafka.info().sasl_port,
        kafka.info().sasl_tls_port,
    ] {
        TcpStream::connect(("127.0.0.1", port.expect("a listener")))
            .await
            .expect("it listens");
    }
}

#[tokio::test]
async fn a_dropped_node_leaves_neither_process_nor_folder() {
    let rabbit = need!(Rabbit::start_with(RabbitVersion::V4, NodeOptions::tls()).await);
    let (pid, folder) = (rabbit.pid(), rabbit.info().dir.clone());
    assert!(folder.join("tls/ca.pem").exists());
    drop(rabbit);
    assert!(!folder.exists());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test]
async fn shared_nodes_are_started_once() {
    let first = need!(shared_rabbit(RabbitVersion::V4).await);
    let second = need!(shared_rabbit(RabbitVersion::V4).await);
    assert_eq!(first.pid(), second.pid());
    let kafka = need!(shared_kafka().await);
    assert!(kafka.version().starts_with("4."));
}

#[tokio::test]
async fn a_kafka_behind_a_proxy_advertises_the_proxy() {
    let proxy = TcpProxy::to_port(1).await.unwrap();
    let kafka = need!(Kafka::start_behind(&proxy).await);
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    // Metadata v1 for no topic; the answer lists the brokers with their ports.
    let request = [0, 3, 0, 1, 0, 0, 0, 7, 0, 1, b't', 0, 0, 0, 0];
    stream
        .write_all(&[0, 0, 0, request.len() as u8])
        .await
        .unwrap();
    stream.write_all(&request).await.unwrap();
    let mut answer = vec![0; 37];
    wait::within(
        SOON,
        "an answer through the proxy",
        stream.read_exact(&mut answer),
    )
    .await
    .unwrap();
    // size 4, correlation 4, count 4, node id 4, host 2 + 9, port 4
    assert_eq!(&answer[18..27], b"127.0.0.1");
    assert_eq!(
        u32::from_be_bytes(answer[27..31].try_into().unwrap()),
        u32::from(proxy.port())
    );
    assert_ne!(proxy.port(), kafka.port());
    proxy.close().await;
}

#[tokio::test]
async fn the_proxy_passes_bytes_both_ways_and_counts_them() {
    let (proxy, _echo) = echo().await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n as u8).collect();
    let (mut reader, mut writer) = stream.split();
    let mut got = vec![0; sent.len()];
    let (written, read) = tokio::join!(writer.write_all(&sent), reader.read_exact(&mut got));
    written.unwrap();
    read.unwrap();
    assert!(got == sent);
    assert_eq!(proxy.counters().bytes_to_server, 1_000_000);
    assert_eq!(proxy.counters().open, 1);
    drop(stream);
    wait::until(SOON, "the closed connection is gone", || async {
        proxy.counters().open == 0
    })
    .await;
    proxy.close().await;
}

#[tokio::test]
async fn a_cut_link_closes_and_refuses_until_it_is_healed() {
    let (proxy, _echo) = echo().await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    ping(&mut stream).await;
    proxy.cut().await;
    let end = wait::within(SOON, "the connection ends", stream.read(&mut [0; 1])).await;
    assert!(matches!(end, Ok(0) | Err(_)));
    assert!(TcpStream::connect(proxy.address()).await.is_err());
    proxy.heal().await;
    ping(&mut TcpStream::connect(proxy.address()).await.unwrap()).await;
}

#[tokio::test]
async fn a_half_open_link_is_silent_and_loses_nothing() {
    let (proxy, _echo) = echo().await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    ping(&mut stream).await;
    for direction in [None, Some(Direction::ToServer), Some(Direction::ToClient)] {
        match direction {
            None => proxy.half_open(),
            Some(direction) => proxy.drop_direction(direction),
        }
        stream.write_all(b"held").await.unwrap();
        let mut answer = [0; 4];
        let quiet =
            tokio::time::timeout(Duration::from_millis(100), stream.read(&mut answer)).await;
        assert!(quiet.is_err(), "{direction:?} was not silent");
        proxy.heal().await;
        wait::within(
            SOON,
            "what was held arrives",
            stream.read_exact(&mut answer),
        )
        .await
        .unwrap();
        assert_eq!(&answer, b"held");
    }
}

#[tokio::test]
async fn delay_and_rate_hold() {
    let (proxy, _echo) = echo().await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    proxy.set_delay(Duration::from_millis(50));
    let start = Instant::now();
    ping(&mut stream).await;
    assert!(
        start.elapsed() >= Duration::from_millis(100),
        "50 ms each way"
    );
    proxy.set_delay(Duration::ZERO);
    proxy.set_rate(Some(100_000));
    let start = Instant::now();
    stream.write_all(&[7; 20_000]).await.unwrap();
    wait::within(
        SOON,
        "the slow link delivers",
        stream.read_exact(&mut [0; 20_000]),
    )
    .await
    .unwrap();
    assert!(
        start.elapsed() >= Duration::from_millis(190),
        "20 kB at 100 kB/s"
    );
}

#[tokio::test]
async fn a_proxy_follows_its_target() {
    let (proxy, _first) = echo().await;
    proxy.set_target(([127, 0, 0, 1], 1).into());
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    let end = wait::within(SOON, "no target, no connection", stream.read(&mut [0; 1])).await;
    assert!(matches!(end, Ok(0) | Err(_)));
    assert_eq!(proxy.counters().refused, 1);
    let (address, _second) = echo_server().await;
    proxy.set_target(address);
    ping(&mut TcpStream::connect(proxy.address()).await.unwrap()).await;
}

async fn ping(stream: &mut TcpStream) {
    stream.write_all(b"ping").await.unwrap();
    let mut answer = [0; 4];
    wait::within(SOON, "an echo", stream.read_exact(&mut answer))
        .await
        .unwrap();
    assert_eq!(&answer, b"ping");
}

async fn echo() -> (TcpProxy, tokio::task::JoinSet<()>) {
    let (address, tasks) = echo_server().await;
    (TcpProxy::start(address).await.unwrap(), tasks)
}

async fn echo_server() -> (std::net::SocketAddr, tokio::task::JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _closed = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    (address, tasks)
}
