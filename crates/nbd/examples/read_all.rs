//! Reads a whole export to nowhere and says how fast that was:
//! `read_all SOCKET [EXPORT [REQUEST_KIB [IN_FLIGHT]]]`.

use futures_util::{StreamExt, TryStreamExt, stream};
use std::{error::Error, time::Instant};
use stillpoint_model::{Length, Range};
use stillpoint_nbd::{Client, Options};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("usage: read_all SOCKET [EXPORT [REQUEST_KIB [IN_FLIGHT]]]")?;
    let export = arguments.next().unwrap_or_default();
    let request: u64 = arguments.next().map_or(Ok(1024), |kib| kib.parse())?;
    let in_flight: usize = arguments.next().map_or(Ok(8), |number| number.parse())?;

    let client = Client::connect_unix(socket.as_ref(), Options::new(export).in_flight(in_flight)).await?;
    let start = Instant::now();
    let read = stream::iter(Range::whole(client.size())?.chunks(Length::new(request << 10)))
        .map(|part| client.read(part))
        .buffer_unordered(in_flight)
        .try_fold(0, |sum, bytes| async move { Ok(sum + bytes.len()) })
        .await?;
    let seconds = start.elapsed().as_secs_f64();
    client.disconnect().await?;
    let mebibytes = read >> 20;
    #[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
    let rate = mebibytes as f64 / seconds;
    println!("{mebibytes} MiB in {seconds:.2} s: {rate:.0} MiB/s");
    Ok(())
}
