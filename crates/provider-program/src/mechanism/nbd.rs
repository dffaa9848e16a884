//! By an NBD export of our own, in front of QEMU's: nothing that a program sends reaches QEMU unchecked.

use crate::{
    protocol::Handle,
    volume::{DIRTY_CONTEXT, ServedVolume},
};
use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};
use stillpoint_nbd::server::{Export, Exports, Server};
use stillpoint_provider::{Error, ErrorKind, Result};
use tokio::net::UnixListener;

pub(crate) struct NbdHandover {
    server: Server,
    socket: PathBuf,
}

impl NbdHandover {
    pub(crate) fn start(directory: &Path, volumes: &[Arc<ServedVolume>]) -> Result<Self> {
        let socket = directory.join("nbd");
        let failed =
            |error| Error::new(ErrorKind::Io, format!("listen on {}", socket.display())).because(error);
        let listener = UnixListener::bind(&socket).map_err(failed)?;
        fs::set_permissions(&socket, Permissions::from_mode(0o600)).map_err(failed)?;
        let export = |volume: &Arc<ServedVolume>| {
            (volume.name.as_str().to_owned(), Arc::clone(volume) as Arc<dyn Export>)
        };
        let exports: Exports = volumes.iter().map(export).collect();
        Ok(Self { server: Server::start(listener, exports), socket })
    }

    pub(crate) fn handle(&self, volume: &ServedVolume) -> Handle {
        Handle::Nbd {
            socket: self.socket.clone(),
            export: volume.name.as_str().to_owned(),
            dirty_context: volume.has_map().then(|| DIRTY_CONTEXT.to_owned()),
        }
    }

    pub(crate) async fn end(self) {
        self.server.end().await;
        let _ = fs::remove_file(&self.socket);
    }
}
