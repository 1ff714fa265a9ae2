; A 1.44 MB floppy with a FAT12 header. Its boot sector asks for the geometry, and loads a second stage track by track.
    bits 16
    org 0x7c00
    jmp short boot
    nop
    db "MYOS 1.0"
    dw 512
    db 1
    dw 1
    db 2
    dw 224
    dw 2880
    db 0xf0
    dw 9
    dw 18
    dw 2
    dd 0, 0
    db 0, 0, 0x29
    dd 0x12345678
    db "NO NAME    ", "FAT12   "

boot:
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    sti
    mov [drive], dl
    xor ax, ax
    int 0x13
    jc failed
    mov ah, 0x08
    mov dl, [drive]
    int 0x13
    jc failed
    and cx, 0x3f
    mov [per_track], cx
    xor ax, ax
    mov es, ax
    mov si, 3               ; tries, as floppies want them
try:
    mov ax, 0x0201
    mov cx, 0x2802          ; track 40, sector 2
    mov dh, 1
    mov dl, [drive]
    mov bx, 0x8000
    int 0x13
    jnc 0x8000
    dec si
    jnz try
failed:
    mov al, '!'
    mov ah, 0x0e
    int 0x10
    hlt

drive:     db 0
per_track: dw 0

    times 510-($-$$) db 0
    dw 0xaa55

    times ((40 * 2 + 1) * 18 + 1) * 512 - ($ - $$) db 0
second:
    mov si, greeting - second + 0x8000
    call print
    xor ah, ah
    int 0x16                ; wait for a key
    mov ax, 0x0201          ; the last sector of the disk
    mov cx, 0x4f12
    mov dh, 1
    mov dl, [drive]
    mov bx, 0x9000
    int 0x13
    jc .failed
    mov si, 0x9000
    call print
    mov ax, 0x0301          ; write the first one of track 50, and read it again
    mov cx, 0x3201
    mov bx, 0x9000
    int 0x13
    jc .failed
    mov ax, 0x0201
    mov bx, 0xa000
    int 0x13
    mov si, 0xa000
    call print
    mov ax, 0x5307          ; off
    mov bx, 1
    mov cx, 3
    int 0x15
.failed:
    cli
    hlt
print:
    lodsb
    test al, al
    jz .done
    mov ah, 0x0e
    int 0x10
    jmp print
.done:
    ret
greeting: db "second stage, press a key", 13, 10, 0

    times 2879 * 512 - ($ - $$) db 0
    db "the last sector", 13, 10, 0
    times 2880 * 512 - ($ - $$) db 0
