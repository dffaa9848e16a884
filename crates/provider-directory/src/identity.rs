//! Who a target is.

use crate::{envelope, error::from_image, layout};
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

/// Reads the identity, or draws it. It is written aside and renamed, so that a crash leaves either none (it is drawn
/// again, and no bitmap was made under the lost one) or all of it. Of two who draw at once, the second's rename is
/// refused and it reads the first's.
pub(crate) fn read_or_draw(target: &Directory) -> Result<TargetId> {
    if target.contains(layout::IDENTITY).map_err(from_image)? {
        return Ok(envelope::read::<Identity>(target, layout::IDENTITY)?.id);
    }
    let id = TargetId::new(random()?);
    let aside = format!(".{}-{:08x}", layout::IDENTITY, random()?);
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
    Ok(envelope::read::<Identity>(target, layout::IDENTITY)?.id)
}
