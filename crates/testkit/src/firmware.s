# What the firmware boots in `firmware.rs`: for each byte that comes over the first serial port, a sector full of it is
# written to every disk that the BIOS knows, through the BIOS, which has a driver of its own for each kind. One sign a
# disk comes back, + or -, and a dot at the end.
#
# as --32 firmware.s -o firmware.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary firmware.o -o firmware.bin
.code16
.globl _start
_start:
    cli
    xorw %ax,%ax
    movw %ax,%ds
    movw %ax,%es
    movw %ax,%ss
    movw $0x7c00,%sp
    sti
    cld
again:
    movb $'.',%al
    call say
wait:
    movw $0x3fd,%dx
    inb %dx,%al
    testb $1,%al
    jz wait
    movw $0x3f8,%dx
    inb %dx,%al
    # the sector to write, at 0x8000
    movw $0x8000,%di
    movw $512,%cx
    rep stosb
    # hard disks, as many as the BIOS counted: its extended write (INT 13h, AH=43h)
    movb $0x80,%dl
hard:
    movb %dl,%al
    subb $0x80,%al
    cmpb 0x475,%al
    jae floppies
    pushw %dx
    movw $packet,%si
    movw $0x4300,%ax
    int $0x13
    call tell
    popw %dx
    incw %dx
    jmp hard
floppies:
    # bit 0 of the equipment word: there is one. Sector 9 of the first track (INT 13h, AH=03h)
    testb $1,0x410
    jz again
    movw $0x0301,%ax
    movw $0x8000,%bx
    movw $0x0009,%cx
    xorw %dx,%dx
    int $0x13
    call tell
    jmp again
tell:
    movb $'-',%al
    jc say
    movb $'+',%al
say:
    movb %al,%ah
    movw $0x3fd,%dx
full:
    inb %dx,%al
    testb $0x20,%al
    jz full
    movb %ah,%al
    movw $0x3f8,%dx
    outb %al,%dx
    ret
.balign 4
packet:
    .byte 16,0
    .word 1
    .word 0x8000,0
    .quad 64            # where, in sectors
