//! Actors in runners of their own.

use super::fixture::*;
use super::forge;

const MAKE: &str = "class C:\n  n = 0\n  def add(self, by):\n    self.n += by\n    return self.n\n  \
    def die(self):\n    import os\n    os._exit(3)\ndef f(): return C()";

async fn call(fixture: &Fixture, method: &str, args: &str, show: &str) -> String {
    let message = format!(
        "message = {{'op': 'actor_execute', 'actor': 'a', 'function': '{method}', 'args': {args}, 'kwargs': {{}}}}"
    );
    let reply = fixture.pool.actor_request(&"a".into(), forge::dumps(&message)).await;
    forge::loads(&reply, show)
}

fn actor() -> Job {
    Job { actor: true, ..job("a", MAKE) }
}

#[tokio::test]
async fn an_actor_keeps_its_state_and_takes_no_slot() {
    let mut fixture = Fixture::new(1);
    fixture.pool.submit(actor());
    assert_eq!(fixture.finished().await.typename.as_ref(), "__main__.C");
    assert_eq!(call(&fixture, "add", "[5]", "message['result']").await, "5");
    let own = fixture.run("def f():\n  import os\n  return os.getpid()").await;
    assert_eq!(call(&fixture, "add", "[2]", "message['result']").await, "7");
    let again = fixture.run("def f():\n  import os\n  return os.getpid()").await;
    assert_eq!(own.thread, again.thread, "a second runner took both tasks");
    let runners = |fixture: &Fixture| {
        fixture.pool.processes().iter().filter(|process| process.kind == ProcessKind::Runner).count()
    };
    assert_eq!(runners(&fixture), 2);
    let raised =
        call(&fixture, "add", "['x']", "message['status'], type(message['exception']).__name__").await;
    assert_eq!(raised, "('error', 'TypeError')");

    fixture.pool.drop_actor(&"a".into());
    let gone = call(&fixture, "add", "[1]", "message['status'], str(message['exception'])").await;
    assert!(gone.contains("this worker does not have it"), "{gone}");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn calls_of_an_actor_that_dies_say_so() {
    let mut fixture = Fixture::new(1);
    fixture.pool.submit(actor());
    fixture.finished().await;
    for _ in 0..2 {
        let lost = call(&fixture, "die", "[]", "message['status'], str(message['exception'])").await;
        assert!(lost.contains("'error'") && lost.contains("exited with code 3"), "{lost}");
    }
    assert!(matches!(fixture.next().await, Event::RunnerDied { key: None, .. }));
    fixture.run("def f(): return 1").await;
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn an_actor_that_cannot_be_made_leaves_its_runner() {
    let mut fixture = Fixture::new(1);
    fixture.pool.submit(Job { actor: true, ..job("a", "def f(): raise ValueError") });
    let failed = fixture.failed().await;
    let next = fixture.run("def f(): return 1").await;
    assert_eq!(failed.thread, Some(next.thread));
    fixture.pool.shutdown().await;
}
