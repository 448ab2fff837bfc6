//! The service process.

use super::fixture::*;
use super::forge;

#[tokio::test]
async fn the_service_answers_comm_messages() {
    let fixture = Fixture::new(1);
    let run = "import pickle, cloudpickle\n\
        def g(a, dask_worker=None): return a + len(dask_worker.name or '')\n\
        message = {'op': 'run', 'function': cloudpickle.dumps(g), 'args': pickle.dumps((4,))}";
    let reply = fixture.pool.service_request(forge::dumps(run), Target::Worker).await;
    assert_eq!(forge::loads(&reply, "message.get('result', message)"), "4");

    let reply = fixture.pool.service_request(forge::dumps("message = {'op': 'nope'}"), Target::Worker).await;
    assert_eq!(forge::loads(&reply, "message"), "None");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn the_service_serves_many_and_dies_without_harm() {
    let fixture = Fixture::new(1);
    let ask = |code: &str| {
        let run = format!(
            "import pickle, cloudpickle\n{code}\nmessage = {{'op': 'run', 'function': cloudpickle.dumps(g)}}"
        );
        let (pool, frames) = (fixture.pool.clone(), forge::dumps(&run));
        tokio::spawn(async move { pool.service_request(frames, Target::Worker).await })
    };
    let slow = ask("import asyncio\nasync def g(): await asyncio.sleep(0.5); return 'slow'");
    let large = ask("def g(): return b'x' * 1_000_000");
    let fails = ask("def g(): raise OSError(5)");
    let fast = ask("def g(): return 'fast'").await.unwrap();
    assert!(!slow.is_finished());
    assert_eq!(forge::loads(&fast, "message['result']"), "'fast'");
    assert_eq!(forge::loads(&large.await.unwrap(), "len(message['result'])"), "1000000");
    assert_eq!(
        forge::loads(&fails.await.unwrap(), "message['status'], message['exception_text']"),
        "('error', 'OSError(5)')"
    );
    assert_eq!(forge::loads(&slow.await.unwrap(), "message['result']"), "'slow'");

    let dead = ask("import os\ndef g(): os._exit(4)").await.unwrap();
    let text = forge::loads(&dead, "message['status'], message['exception_text']");
    assert!(text.contains("uncaught-error") && text.contains("exited with code 4"), "{text}");
    let again = ask("def g(): return 'again'").await.unwrap();
    assert_eq!(forge::loads(&again, "message['result']"), "'again'");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn scattered_objects_are_described() {
    let mut fixture = Fixture::new(1);
    let object = fixture.run("def f():\n  import numpy\n  return numpy.ones(100_000)").await.object;
    let bad = Object::new(object.kind(), "nonsense".into(), vec![], 0);
    let described = fixture.pool.describe(&[object, bad]).await.unwrap();
    let first = described[0].as_ref().unwrap();
    assert_eq!((first.nbytes, first.typename.as_str()), (800_000, "numpy.ndarray"));
    assert!(described[1].is_err());
    fixture.pool.shutdown().await;
}
