; int 16h, the keyboard: what is typed at the serial port

int16:
    SERVICE
    and ah, 0xef                            ; 10h, 11h and 12h are the same for a larger keyboard
    jz .read
    dec ah
    jz .look
    dec ah
    jz .shift
    cmp ah, 1                               ; 03h: the repeat rate
    je leave_service
    UNSERVED 0x16
.shift:
    mov byte [bp + C_AX], 0
    jmp leave_service

.read:
    call take_key
    jz .read_more
    mov [bp + C_AX], ax
    jmp leave_service
.read_more:
    call wait_for_byte
    call put_key
    jmp .read

.look:                                      ; ZF is clear where there is a key
    call have_byte
    jz .looked
    call wait_for_byte
    call put_key
.looked:
    and byte [bp + C_FLAGS], 0xbf
    mov ax, [KEY]
    test ax, ax
    jz .no_key
    mov [bp + C_AX], ax
    jmp leave_service
.no_key:
    or byte [bp + C_FLAGS], 0x40
    jmp leave_service

; One key is kept here, where a PC's BIOS keeps sixteen; 0 is none.
KEY     equ 0x41e
; How much of ESC [ A was seen: an arrow key is three bytes
ESCAPE  equ 0x496

; AX = the key, and ZF clear; or ZF set.
take_key:
    mov ax, [KEY]
    mov word [KEY], 0
    test ax, ax
    ret

; Make AL a key, unless one is kept that nobody has taken: then it waits in the serial port.
put_key:
    cmp al, 10                              ; what a pipe sends for Return
    jne .not_line_feed
    mov al, 13
.not_line_feed:
    cmp al, 127
    jne .not_delete
    mov al, 8
.not_delete:
    cmp byte [ESCAPE], 1
    jb .plain
    ja .arrow
    cmp al, '['
    jne .plain
    inc byte [ESCAPE]
    ret
.arrow:
    mov byte [ESCAPE], 0
    sub al, 'A'
    cmp al, 3
    ja .other
    mov bx, arrows
    cs xlatb
    mov ah, al
    xor al, al
    mov [KEY], ax
.other:
    ret
.plain:
    mov byte [ESCAPE], 0
    xor ah, ah
    test al, 0x80
    jnz .known
    push ax
    mov bx, scan_codes
    cs xlatb
    mov bl, al
    pop ax
    mov ah, bl
.known:
    cmp al, 27
    jne .key
    call have_byte                          ; the rest of an arrow key comes with it
    jz .key
    mov byte [ESCAPE], 1
    ret
.key:
    mov [KEY], ax
    ret

; ZF set: no byte waits that could become a key.
have_byte:
    cmp word [KEY], 0
    jne .none
    push ax
    push dx
    mov dx, SERIAL + 5
    in al, dx
    test al, 1
    pop dx
    pop ax
    ret
.none:
    cmp al, al
    ret

; AL = the next byte from the serial port. A CPU that waits stands still, where an interrupt can wake it. The port
; interrupts only meanwhile: a guest that uses it by itself must find no interrupt that has come already.
wait_for_byte:
    mov dx, SERIAL + 5
.look:
    cli
    in al, dx
    test al, 1
    jnz .there
    test byte [cs:interrupts], 1
    jz .nothing_wakes
    mov dx, SERIAL + 1
    in al, dx
    push ax
    or al, 1
    out dx, al
    sti                                     ; holds from after the next instruction on, so none is missed
    hlt
    cli
    pop ax
    out dx, al
    jmp wait_for_byte
.nothing_wakes:
    sti
    pause
    jmp .look
.there:
    mov dx, SERIAL
    in al, dx
    sti
    ret

arrows:     db 0x48, 0x50, 0x4d, 0x4b       ; up, down, right, left
scan_codes: ; the keys of a US keyboard
    db 0x03, 0x1e, 0x30, 0x2e, 0x20, 0x12, 0x21, 0x22, 0x0e, 0x0f, 0x24, 0x25, 0x26, 0x1c, 0x31, 0x18
    db 0x19, 0x10, 0x13, 0x1f, 0x14, 0x16, 0x2f, 0x11, 0x2d, 0x15, 0x2c, 0x01, 0x2b, 0x1b, 0x07, 0x0c
    db 0x39, 0x02, 0x28, 0x04, 0x05, 0x06, 0x08, 0x28, 0x0a, 0x0b, 0x09, 0x0d, 0x33, 0x0c, 0x34, 0x35
    db 0x0b, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x27, 0x27, 0x33, 0x0d, 0x34, 0x35
    db 0x03, 0x1e, 0x30, 0x2e, 0x20, 0x12, 0x21, 0x22, 0x23, 0x17, 0x24, 0x25, 0x26, 0x32, 0x31, 0x18
    db 0x19, 0x10, 0x13, 0x1f, 0x14, 0x16, 0x2f, 0x11, 0x2d, 0x15, 0x2c, 0x1a, 0x2b, 0x1b, 0x07, 0x0c
    db 0x29, 0x1e, 0x30, 0x2e, 0x20, 0x12, 0x21, 0x22, 0x23, 0x17, 0x24, 0x25, 0x26, 0x32, 0x31, 0x18
    db 0x19, 0x10, 0x13, 0x1f, 0x14, 0x16, 0x2f, 0x11, 0x2d, 0x15, 0x2c, 0x1a, 0x2b, 0x1b, 0x29, 0x0e
