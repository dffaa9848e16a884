//! Who a target is.

use crate::{
    envelope,
    error::{from_image, may_pass},
    layout,
};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use stillpoint_image::{self as image, Directory};
use stillpoint_model::TargetId;
use stillpoint_provider::{Error, ErrorKind, Result};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    id: TargetId,
}

/// Four bytes that nobody else has.
fn random() -> Result<u32> {
    let mut bytes = [0; 4];
    getrandom(&mut bytes, GetRandomFlags::empty())
        .map_err(|source| Error::new(ErrorKind::Io, "cannot get random bytes").because(source))?;
    Ok(u32::from_ne_bytes(bytes))
}

/// Reads the identity of the target.
pub(crate) fn read(target: &Directory) -> Result<TargetId> {
    Ok(envelope::read::<Identity>(target, layout::IDENTITY)?.id)
}

/// Draws an identity, unless there is one that can be read. It is written aside and renamed, so that a crash leaves either none (it is
/// drawn again, and no bitmap was made under the lost one) or all of it. Of two who draw at once, the second's rename is
/// refused and it reads the first's.
pub(crate) fn draw(target: &Directory) -> Result<TargetId> {
    if target.contains(layout::IDENTITY).map_err(from_image)? {
        match read(target) {
            Ok(id) => return Ok(id),
            // It is of no use any more, and whoever asks for another knows it.
            Err(error) if error.kind() == ErrorKind::Damaged && !may_pass(&error) => {
                target.remove_tree(layout::IDENTITY).map_err(from_image)?;
            }
            Err(error) => return Err(error),
        }
    }
    let id = TargetId::new(random()?);
    let aside = layout::aside(random()?);
    let written = target.write_file(&aside, &envelope::seal(&Identity { id })?);
    let renamed = written.and_then(|()| target.rename(&aside, layout::IDENTITY));
    match renamed {
        Ok(()) => {}
        Err(error) => {
            let _left = target.remove_tree(&aside);
            if error.kind() != image::ErrorKind::Exists {
                return Err(from_image(error));
            }
        }
    }
    target.sync().map_err(from_image)?;
    read(target)
}
