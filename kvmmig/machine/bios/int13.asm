; int 13h, the disk: the image that was given, as drive 0 and as drive 80h; the host copies the sectors

int13:
    SERVICE
    test dl, 0x7f
    mov al, 0x01                            ; there is no such drive
    jnz .failed
    cmp ah, 0x00                            ; reset
    je .fine
    cmp ah, 0x01
    je .last_status
    cmp ah, 0x02
    je .read
    cmp ah, 0x03
    je .write
    cmp ah, 0x04                            ; verify
    je .fine
    cmp ah, 0x08
    je .geometry
    cmp ah, 0x0d                            ; reset, recalibrate, was it changed, media types
    je .fine
    cmp ah, 0x11
    je .fine
    cmp ah, 0x15
    je .kind
    cmp ah, 0x16
    jb .unserved
    cmp ah, 0x18
    jbe .fine
    cmp ah, 0x41
    je .extensions
    cmp ah, 0x42
    je .extended_read
    cmp ah, 0x43
    je .extended_write
    cmp ah, 0x48
    je .extended_geometry
.unserved:
    UNSERVED 0x13

.fine:
    xor al, al
    mov [DISK_STATUS], al
    mov [bp + C_AX + 1], al
    jmp good
.last_status:
    mov al, [DISK_STATUS]
.status:                                    ; AL, with carry where it is not 0
    mov [DISK_STATUS], al
    mov [bp + C_AX + 1], al
    test al, al
    jz good
    jmp bad
.failed:
    mov [DISK_STATUS], al
    mov [bp + C_AX + 1], al
    jmp bad

.read:
    mov al, HOST_READ
    jmp .by_track
.write:
    mov al, HOST_WRITE
.by_track:                                  ; CL: sector from 1, and the track's upper bits; CH: track; DH: head
    mov bl, al
    movzx eax, cl
    shl ax, 2
    mov al, ch                              ; the track, with CL's upper bits for its own
    and ah, 3
    movzx esi, cl
    and si, 0x3f
    jz .no_sector
    cmp si, [es:track_sectors]
    ja .no_sector
    cmp dh, [es:disk_heads]
    jae .no_sector
    cmp ax, [es:disk_tracks]
    jae .no_sector
    movzx ecx, word [es:disk_heads]
    movzx edi, dh
    mul ecx
    add eax, edi
    movzx ecx, word [es:track_sectors]
    mul ecx
    lea eax, [eax + esi - 1]
    mov [es:request.sector], eax
    movzx eax, byte [bp + C_AX]             ; sectors
    mov [es:request.count], ax
    movzx eax, word [bp + C_ES]
    shl eax, 4
    movzx ecx, word [bp + C_BX]
    add eax, ecx
    mov [es:request.address], eax
    call ask_host
    jmp .status
.no_sector:
    mov al, 0x04
    jmp .failed

.geometry:
    mov ax, [es:disk_tracks]
    dec ax
    mov ch, al
    mov cl, ah
    shl cl, 6
    or cl, [es:track_sectors]
    mov [bp + C_CX], cx
    mov al, [es:disk_heads]
    dec al
    mov [bp + C_DX + 1], al
    mov byte [bp + C_DX], 1                 ; drives
    mov word [bp + C_AX], 0
    mov byte [bp + C_BX], 0
    test byte [es:drive], 0x80
    jnz good
    mov byte [bp + C_BX], 4
    mov word [bp + C_DI], floppy_table
    mov [bp + C_ES], cs
    jmp good

.kind:
    mov byte [bp + C_AX + 1], 1             ; a floppy drive that does not tell of a change
    test byte [es:drive], 0x80
    jz good
    mov byte [bp + C_AX + 1], 3
    mov eax, [es:disk_sectors]
    mov [bp + C_DX], ax
    shr eax, 16
    mov [bp + C_CX], ax
    jmp good

.extensions:
    mov al, 0x01
    cmp bx, 0x55aa
    jne .failed
    mov word [bp + C_BX], 0xaa55
    mov byte [bp + C_AX + 1], 0x01
    mov word [bp + C_CX], 1
    jmp good

.extended_read:
    mov bl, HOST_READ
    jmp .by_packet
.extended_write:
    mov bl, HOST_WRITE
.by_packet:                                 ; caller's DS:SI: size, 0, sectors, offset, segment, first sector (8 bytes)
    mov ds, [bp + C_DS]
    mov al, 0x01
    cmp byte [si], 0x10
    jb .bad_packet
    cmp dword [si + 12], 0
    jne .bad_packet
    mov eax, [si + 8]
    mov [es:request.sector], eax
    mov ax, [si + 2]
    mov [es:request.count], ax
    movzx eax, word [si + 6]
    shl eax, 4
    movzx ecx, word [si + 4]
    add eax, ecx
    mov [es:request.address], eax
    push 0
    pop ds
    call ask_host
    jmp .status
.bad_packet:
    push 0
    pop ds
    jmp .failed

.extended_geometry:
    mov ds, [bp + C_DS]
    mov word [si], 0x1a
    mov word [si + 2], 2                    ; the geometry is valid
    movzx eax, word [es:disk_tracks]
    mov [si + 4], eax
    movzx eax, word [es:disk_heads]
    mov [si + 8], eax
    movzx eax, word [es:track_sectors]
    mov [si + 12], eax
    mov eax, [es:disk_sectors]
    mov [si + 16], eax
    mov dword [si + 20], 0
    mov word [si + 24], 512
    push 0
    pop ds
    jmp .fine

; Have the host do BL with `request`; its answer comes in AL.
ask_host:
    mov byte [es:request.status], 0x20      ; what a controller says that does not work
    mov al, bl
    mov dx, PORT
    out dx, al
    mov al, [es:request.status]
    ret
